//! One request's life: hygiene, decision, tries, response.
//!
//! ```text
//!   hygiene ─▶ Decide ─▶ Respond ─────────────────────────────────────────▶ local answer
//!                └────▶ Forward ─▶ endpoint ─▶ connection ─▶ response's head ─▶ relay
//!                          ▲                        │               │
//!                          └── pause ◀── is it to be tried again? ◀─┘
//! ```
//!
//! The response's body and what is left of the request's pass at the same time, so an endpoint may answer early, and
//! both may stream for as long as they like.

mod switch;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::http::alarm::Alarm;
use crate::http::channel::Channel;
use crate::http::decide::{
    Call, Connection, Decided, Decision, Endpoints, Facts, Flag, Forwarding, Measured, More, Outcome, Picked,
    Protocol, Reading, Record, Response, Retries, Retrying, Target, Waiting,
};
use crate::http::failure::{Class, Failure, is_good, local_head, outcome};
use crate::http::h1::Framing;
use crate::http::head::{RequestHead, ResponseHead};
use crate::http::held::{OfClient, Share, TooMuch};
use crate::http::hygiene::{self, Hop};
use crate::http::limit::Limit;
use crate::http::messages::{Messages, grpc_status, http_of};
use crate::http::mirror;
use crate::http::pump::{Pump, PumpError};
use crate::http::worker::Worker;
use crate::upstream::pool::Lease;

/// What becomes of the client's connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// The next request can come.
    Next,
    /// It ends in good order: the response is whole.
    Close,
    /// It ends at once: the client has gone, or must see that the response is not whole.
    Abort,
}

/// A response's way, the endpoint that it is of, and the leave for the try that it is of.
type Answered = ((Lease, Framing), Picked, Retrying);

/// Informational responses of an endpoint that are taken.
const MAX_INFORMATIONAL: u32 = 16;
/// What is read of a request's body that nobody takes.
const DISCARDED: u64 = 64 * 1024;
/// How often it is looked at whether a client has left whose body nobody takes.
const LOOK: Duration = Duration::from_secs(1);

/// The informational responses before a try's response.
struct Words<'a> {
    how: &'a Forwarding,
    more: Option<&'a More>,
    /// How many may still come.
    left: u32,
    /// Whether one was passed on.
    passed: bool,
}

/// A request under way.
pub(crate) struct Exchange<'a> {
    worker: &'a Arc<Worker>,
    connection: &'a Connection,
    client: &'a mut Channel,
    request: &'a mut RequestHead,
    alarm: &'a mut Alarm,
    framing: Framing,
    hop: Hop,
    decided: Decided,
    record: Record,
    upload: Pump,
    held: Option<Share>,
    reply: ResponseHead,
    whole: Limit,
    this_try: Limit,
    idle: Duration,
    idle_deadline: Instant,
    /// When it is looked at next whether a client has left whose body nobody takes.
    next_look: Instant,
}

/// Takes a request, whose head has come, to its end.
pub(crate) async fn exchange(
    worker: &Arc<Worker>,
    (connection, held): (&Connection, &Arc<OfClient>),
    client: &mut Channel,
    request: &mut RequestHead,
    alarm: &mut Alarm,
    framing: Framing,
) -> After {
    let started = Instant::now();
    worker.stats.requests.inc();
    worker.stats.requests_now.inc();
    let idle = worker.settings.stream_idle_timeout;
    let mut exchange = Exchange {
        worker,
        connection,
        client,
        request,
        alarm,
        framing,
        hop: Hop::default(),
        decided: Decided::default(),
        record: Record::begun(started),
        upload: Pump::new(framing == Framing::None),
        held: None,
        reply: ResponseHead::default(),
        whole: Limit::default(),
        this_try: Limit::default(),
        idle,
        idle_deadline: started + idle,
        next_look: started + LOOK,
    };
    let after = match Share::new(held) {
        Ok(share) => {
            exchange.held = Some(share);
            exchange.run().await
        }
        Err(TooMuch) => exchange.fail(Failure::HELD).await,
    };
    exchange.record.received = exchange.upload.bytes;
    exchange.record.request_messages = exchange.upload.messages.map_or(0, Messages::count);
    let (response, decided) = (&exchange.reply.fields, &exchange.decided);
    worker.decide.ended(exchange.request, response, connection, decided, &exchange.record);
    worker.stats.requests_now.dec();
    after
}

impl Exchange<'_> {
    async fn run(&mut self) -> After {
        self.request.secure = self.connection.secure;
        self.upload.messages = self.request.is_grpc().then(Messages::default);
        if self.request.method() == "CONNECT" {
            self.hop.close = true;
            return self
                .fail(Failure::new(405, Flag::DownstreamProtocolError, "connect", Class::Final))
                .await;
        }
        match hygiene::request(self.request, self.connection, self.worker) {
            Ok(hop) => self.hop = hop,
            Err(refusal) => {
                self.worker.stats.requests_refused.inc();
                tracing::debug!(%refusal, "refused a request");
                self.hop.close = true;
                let (flag, detail) = (Flag::DownstreamProtocolError, "refused");
                let failure = Failure::new(refusal.status(), flag, detail, Class::Final);
                return self.fail(failure).await;
            }
        }
        let mut decision = self.worker.decide.decide(self.request, self.connection, &mut self.decided);
        loop {
            match decision {
                Decision::Respond(response) => {
                    self.discard().await;
                    let detail = self.decided.detail;
                    return self.respond(&response, detail).await;
                }
                Decision::Forward { how, endpoints, more } => {
                    return self.forward(&how, &*endpoints, more.as_deref()).await;
                }
                Decision::Later(waiting) => match self.wait(waiting).await {
                    Ok(next) => decision = next,
                    Err(failure) => return self.fail(failure).await,
                },
                Decision::Read(reading) => match Box::pin(self.read_ahead(reading)).await {
                    Ok(next) => decision = next,
                    Err(failure) => return self.fail(failure).await,
                },
            }
        }
    }

    /// Waits for a decision; while the client has not given up.
    async fn wait(&mut self, mut waiting: Waiting) -> Result<Decision, Failure> {
        let then = poll_fn(|cx| {
            if let Poll::Ready(then) = waiting.as_mut().poll(cx) {
                return Poll::Ready(Ok(then));
            }
            if self.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(Failure::CLIENT_GONE));
            }
            self.hold(None, 0)?;
            self.poll_late(cx).map(Err)
        });
        let then = then.await?;
        Ok(then(self.request, self.connection, &mut self.decided))
    }

    /// Reads the beginning of the body, which stays to be sent on.
    async fn read_ahead(&mut self, reading: Reading) -> Result<Decision, Failure> {
        if std::mem::take(&mut self.hop.expects_continue) && self.framing != Framing::None {
            self.client.send_continue();
            self.flush().await?;
        }
        poll_fn(|cx| {
            match self.upload.poll_ahead(cx, self.client, reading.limit) {
                Poll::Ready(read) => return Poll::Ready(read.map_err(|error| Failure::of_request(&error))),
                Poll::Pending => {}
            }
            self.hold(None, 0)?;
            self.poll_late(cx).map(Err)
        })
        .await?;
        // It is here in any case, so it can be sent again.
        self.upload.keep(self.worker.settings.replay_limit);
        let ahead = self.upload.ahead(reading.limit);
        Ok((reading.then)(ahead, self.request, self.connection, &mut self.decided))
    }

    async fn forward(&mut self, how: &Forwarding, endpoints: &dyn Endpoints, more: Option<&More>) -> After {
        self.whole = Limit::of_call(how.timeouts, self.request, self.record.started);
        self.upload.bar(std::mem::take(&mut self.decided.own_fields));
        if let Some(idle) = how.timeouts.idle {
            self.idle = idle;
            self.idle_deadline = self.record.started + idle;
        }
        if self.framing != Framing::None {
            if how.retries.is_some() {
                self.upload.keep(self.worker.settings.replay_limit);
            }
            if self.hop.expects_continue {
                self.client.send_continue();
                if self.flush().await.is_err() {
                    return self.gone();
                }
            }
        }
        let (answer, picked, _retrying) = match self.tries(how, endpoints, more).await {
            Ok(answered) => answered,
            Err(failure) if failure.status == 0 => return self.gone(),
            Err(failure) => {
                // What is wrong with a body is not read on.
                if failure.flag != Flag::DownstreamProtocolError {
                    self.discard().await;
                }
                // Pages of other origins can read it by these alone, and limits are told whoever answers.
                let edits = more.map(|more| more.response_edits.plain_fields()).unwrap_or_default();
                return self.respond(&failure.response(edits), failure.detail).await;
            }
        };
        if let Some(cookie) = &picked.cookie {
            self.reply.fields.push(b"set-cookie", cookie.as_bytes());
        }
        let later = self.is_told_at_the_end(&Ok(()));
        let after = Box::pin(self.relay(answer, how, more)).await;
        if let Some(outcome) = self.outcome_at_the_end().filter(|_| later) {
            picked.report(outcome);
        }
        drop(picked);
        after
    }

    /// Sends the request until there is a response to pass on; its head is in `reply` then.
    async fn tries(
        &mut self,
        how: &Forwarding,
        endpoints: &dyn Endpoints,
        more: Option<&More>,
    ) -> Result<Answered, Failure> {
        let (mut tried, mut stale, mut retrying) = (Vec::new(), false, Retrying::default());
        let retries = how.retries.as_ref();
        loop {
            let picked = self.pick(endpoints, &tried, retries)?;
            let target = &picked.target;
            self.record.tries += 1;
            self.record.target = Some(Arc::clone(target));
            let result = self.attempt(target, (how, more), stale).await;
            if let Some(outcome) = outcome(&result, &self.reply).filter(|_| !self.is_told_at_the_end(&result))
            {
                picked.report(outcome);
            }
            let left = retries.filter(|r| self.record.tries <= r.attempts);
            let was_stale = stale;
            let again = match &result {
                // Not one of the retries: nobody has seen it, as far as can be told.
                Err(failure) if failure.class == Class::Stale && !stale && self.request.is_idempotent() => {
                    stale = true;
                    self.record.tries = self.record.tries.saturating_sub(1);
                    true
                }
                Err(failure) => left.is_some_and(|r| r.take(failure.class)),
                Ok(_) => left.is_some_and(|r| r.take_response(&self.reply)),
            };
            if !again {
                let wanted = retries.is_some_and(|r| r.attempts > 0 && self.record.tries > r.attempts);
                self.record.retries_exhausted = wanted && !is_good(&result, &self.reply);
                return result.map(|answer| (answer, picked, retrying));
            }
            if !self.upload.can_restart() {
                self.worker.stats.retries_without_body.inc();
                return result.map(|answer| (answer, picked, retrying));
            }
            let is_free = stale && !was_stale;
            match if is_free { Some(Retrying::default()) } else { endpoints.may_retry() } {
                Some(leave) => retrying = leave,
                None => {
                    self.worker.stats.retries_over_budget.inc();
                    self.record.flag = Flag::UpstreamOverflow;
                    self.record.detail = "retry_overflow";
                    return result.map(|answer| (answer, picked, retrying));
                }
            }
            self.worker.stats.retries.inc();
            self.reply.clear();
            self.upload.restart(self.framing == Framing::None);
            tried.push(Arc::clone(target));
            drop(picked);
            // The endpoint is well: it is the connection that had ended.
            if let (Some(retries), false) = (left, is_free) {
                self.pause(retries).await?;
            }
        }
    }

    /// Whether how a call of gRPC went is in the trailers, which have not come.
    fn is_told_at_the_end<T>(&self, result: &Result<T, Failure>) -> bool {
        let head = &self.reply;
        result.is_ok() && self.request.is_grpc() && head.status == 200 && grpc_status(&head.fields).is_none()
    }

    /// How such a call went, now that it has ended; nothing, where it is the client that has left.
    fn outcome_at_the_end(&self) -> Option<Outcome> {
        match (self.record.grpc_status, self.record.flag) {
            (Some(code), _) => Some(Outcome::Status(http_of(code))),
            (None, Flag::UpstreamConnectionTermination | Flag::UpstreamRemoteReset) => Some(Outcome::Failed),
            // A limit of the route's, in the middle of an answer: it says nothing of the endpoint (Envoy's onResponseTimeout).
            (None, Flag::None | Flag::UpstreamOverflow | Flag::UpstreamRequestTimeout) => {
                Some(Outcome::Status(self.record.status))
            }
            _ => None,
        }
    }

    fn pick(
        &self,
        endpoints: &dyn Endpoints,
        tried: &[Arc<Target>],
        retries: Option<&Retries>,
    ) -> Result<Picked, Failure> {
        let elsewhere = !tried.is_empty() && retries.is_some_and(|r| r.remote_localities);
        // To go elsewhere it has to be known where it was.
        let tried = if retries.is_some_and(|r| r.same_hosts) && !elsewhere { &[] } else { tried };
        let call = Call { request: self.request, connection: self.connection, tried, elsewhere };
        endpoints.pick(&call).map_err(|none| Failure::new(503, none.flag, none.detail, Class::Final))
    }

    /// A pause before a further try, see [`Retries::backoff`].
    async fn pause(&mut self, retries: &Retries) -> Result<(), Failure> {
        let until = Instant::now() + retries.pause(self.record.tries, self.worker.random());
        poll_fn(|cx| {
            if self.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(Failure::CLIENT_GONE));
            }
            let deadline = self.whole.deadline;
            ready!(self.alarm.poll(cx, deadline.map_or(until, |deadline| deadline.min(until))));
            if deadline.is_some_and(|deadline| deadline < until) {
                return Poll::Ready(Err(self.whole.failure()));
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Sends the request once, up to the response's head.
    async fn attempt(
        &mut self,
        target: &Arc<Target>,
        (how, more): (&Forwarding, Option<&More>),
        fresh: bool,
    ) -> Result<(Lease, Framing), Failure> {
        let timeouts = how.timeouts;
        self.this_try = Limit::new(timeouts.per_try, Instant::now(), timeouts.measured);
        self.record.unconnected = None;
        let idle =
            if target.protocol == Protocol::Http1 && !fresh { self.worker.pool.idle(target) } else { None };
        let mut lease = match idle {
            Some(lease) => lease,
            None => Box::pin(self.connect(target, fresh)).await?,
        };
        if let Some(more) = more.filter(|more| !more.mirrors.is_empty() && !self.upload.is_copied()) {
            let request = (&*self.request, self.framing);
            self.upload.copy_to(mirror::begin(self.worker, request, self.connection, &more.mirrors));
        }
        if let (Some(protocol), Channel::H1(_)) = (&self.hop.upgrade, &lease.channel) {
            lease.channel.send_upgrade(self.request, self.framing, protocol);
        } else {
            lease.channel.send_request(self.request, self.framing);
        }
        let mut words = Words { how, more, left: MAX_INFORMATIONAL, passed: false };
        let framing = poll_fn(|cx| self.poll_head(cx, &mut lease, &mut words)).await?;
        self.take_switch(&lease)?;
        if timeouts.measured == Measured::Response {
            self.this_try = Limit::default();
        }
        Ok((lease, framing))
    }

    async fn connect(&mut self, target: &Arc<Target>, fresh: bool) -> Result<Lease, Failure> {
        let worker = Arc::clone(self.worker);
        let mut request = std::mem::take(self.request);
        let mut unconnected = None;
        let result = {
            let mut getting = Box::pin(self.way(&worker.pool, target, &request, fresh));
            poll_fn(|cx| {
                if let Poll::Ready(result) = getting.as_mut().poll(cx) {
                    return Poll::Ready(result.map_err(|error| {
                        unconnected = Some(error.to_string().into());
                        Failure::of_pool(&error)
                    }));
                }
                if self.poll_gone(cx).is_ready() {
                    return Poll::Ready(Err(Failure::CLIENT_GONE));
                }
                self.hold(None, 0)?;
                self.poll_late(cx).map(Err)
            })
            .await
        };
        std::mem::swap(self.request, &mut request);
        self.record.unconnected = unconnected;
        result
    }

    /// One step towards the response's head: sends what there is of the request, reads, looks after the client and the
    /// time.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        lease: &mut Lease,
        words: &mut Words<'_>,
    ) -> Poll<Result<Framing, Failure>> {
        let to_head = self.request.method() == "HEAD";
        match self.upload.poll(cx, self.client, &mut lease.channel) {
            Poll::Ready(Err(PumpError::From(error))) => return Poll::Ready(Err(Failure::of_request(&error))),
            // The endpoint takes no more: perhaps it has answered, which reading tells.
            Poll::Ready(Err(PumpError::To(_)) | Ok(())) | Poll::Pending => {}
        }
        while words.left > 0 {
            match lease.channel.poll_response(cx, &mut self.reply, to_head) {
                Poll::Ready(Ok(_)) if self.reply.status == 101 && !self.upload.done => {
                    // The connection would carry two things at once (RFC 9110 section 7.8).
                    let detail = "a switch of protocols before all of the request";
                    return Poll::Ready(Err(Failure::of_protocol(detail)));
                }
                Poll::Ready(Ok(framing)) if self.is_final() => return Poll::Ready(Ok(framing)),
                Poll::Ready(Ok(_)) if self.reply.status == 101 => {
                    let detail = "a switch to a protocol that was not asked for";
                    return Poll::Ready(Err(Failure::of_protocol(detail)));
                }
                Poll::Ready(Ok(_)) => self.inform(words),
                Poll::Ready(Err(error)) => {
                    // Of HTTP/2, what its server has not looked at is told otherwise.
                    let stale =
                        lease.reused && matches!(&lease.channel, Channel::H1(wire) if !wire.has_received());
                    self.reply.clear();
                    return Poll::Ready(Err(Failure::of_response(&error, stale)));
                }
                Poll::Pending => {
                    let failed = words.passed && matches!(self.client.poll_flush(cx), Poll::Ready(Err(_)));
                    if failed || self.poll_gone(cx).is_ready() {
                        return Poll::Ready(Err(Failure::CLIENT_GONE));
                    }
                    self.hold(Some(&mut lease.channel), 0)?;
                    return self.poll_late(cx).map(Err);
                }
            }
        }
        Poll::Ready(Err(Failure::of_protocol("too many informational responses")))
    }

    /// Passes on the informational response in `reply` (RFC 9110 section 15.2), but for what the route changes in a response. That a
    /// client may go on with its body it was told already.
    fn inform(&mut self, words: &mut Words<'_>) {
        words.left -= 1;
        if self.reply.status != 100 {
            hygiene::response(&mut self.reply, false);
            let edits = words.more.map(|more| &more.response_edits).into_iter();
            for edits in edits.chain([&words.how.response_edits]) {
                edits.withhold(&mut self.reply.fields);
            }
            self.client.send_informational(&self.reply);
            words.passed = true;
        }
        self.reply.clear();
    }

    /// Whether the head in `reply` is the response, not a word before it.
    fn is_final(&self) -> bool {
        self.reply.status >= 200 || (self.reply.status == 101 && self.is_asked_for())
    }

    /// Counts what waits here for somebody to take it: of the request, and of the response, which `server` brings and of which
    /// `more` was read.
    fn hold(&mut self, server: Option<&mut Channel>, more: usize) -> Result<(), Failure> {
        let Some(share) = &mut self.held else { return Ok(()) };
        let bytes = self.upload.held() + self.client.held() + server.map_or(0, Channel::held) + more;
        share.set(bytes).map_err(|TooMuch| Failure::HELD)
    }

    /// Ready when the client has given up.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.upload.is_read() {
            return self.client.poll_gone(cx);
        }
        // Reading tells it otherwise.
        if self.upload.is_blocked() { self.client.poll_left(cx) } else { Poll::Pending }
    }

    /// Ready when it has taken too long.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<Failure> {
        if self.upload.is_read() {
            self.whole.begin();
            self.this_try.begin();
        }
        loop {
            let mut first = self.idle_deadline;
            // A client of TCP that leaves while nobody reads from it wakes nobody.
            let looks = self.upload.is_blocked() && !self.upload.is_read();
            if looks {
                first = first.min(self.next_look);
            }
            for deadline in [self.whole.deadline, self.this_try.deadline].into_iter().flatten() {
                first = first.min(deadline);
            }
            ready!(self.alarm.poll(cx, first));
            if looks && first == self.next_look {
                self.next_look = Instant::now() + LOOK;
                if self.client.poll_left(cx).is_ready() {
                    return Poll::Ready(Failure::CLIENT_GONE);
                }
                continue;
            }
            if self.whole.is_over_at(first) {
                return Poll::Ready(self.whole.failure());
            }
            if self.this_try.is_over_at(first) {
                return Poll::Ready(Failure::TRY_TIMEOUT);
            }
            if !std::mem::take(&mut self.upload.moved) {
                return Poll::Ready(Failure::IDLE);
            }
            // Whether anything moved is looked at once in this time, rather than the clock at each move.
            self.idle_deadline = Instant::now() + self.idle;
        }
    }

    /// Passes the response on, and what is left of the request.
    async fn relay(
        &mut self,
        (mut lease, framing): (Lease, Framing),
        how: &Forwarding,
        more: Option<&More>,
    ) -> After {
        let to_head = self.request.method() == "HEAD";
        let switched = self.reply.status == 101;
        let keeps_length = to_head || self.reply.status == 304;
        let ends = hygiene::response(&mut self.reply, keeps_length) && !switched;
        self.record.status = self.reply.status;
        self.edit(how, more);
        self.record.grpc_status = grpc_status(&self.reply.fields);
        let mut close = self.hop.close || self.worker.drain.is_cancelled();
        if switched {
            self.switch(&mut lease);
        } else {
            let onward = if framing == Framing::UntilClose { Framing::Chunked } else { framing };
            let has_none = to_head || matches!(self.reply.status, 204 | 304);
            // What is not read of the request by the time the response is whole is not waited for.
            close |= !self.upload.is_read() && onward == Framing::None;
            if self.client.send_response(&self.reply, onward, !has_none, close, self.hop.trailers).is_err() {
                return self.gone();
            }
        }
        let mut download = Pump::new(framing == Framing::None && !switched);
        // What was counted of the request says that it is gRPC.
        download.messages = self.upload.messages.map(|_| Messages::default());
        let relayed = poll_fn(|cx| self.poll_relay(cx, &mut lease, &mut download, switched)).await;
        self.record.sent = download.bytes;
        self.record.response_messages = download.messages.map_or(0, Messages::count);
        if let Some(status) = download.trailers().and_then(grpc_status) {
            self.record.grpc_status = Some(status);
        }
        if let Err(failure) = relayed {
            self.record.flag = failure.flag;
            self.record.detail = failure.detail;
            self.client.abort();
            return After::Abort;
        }
        if switched {
            return After::Abort;
        }
        if self.upload.done && !ends && framing != Framing::UntilClose {
            self.worker.pool.put(lease);
        }
        // Of a stream that ends so no more is wanted; the library says so (`NO_ERROR`) once the response is sent. A reset of
        // our own would go before it, and take its place.
        if !self.client.is_read() {
            return After::Close;
        }
        if close { After::Close } else { After::Next }
    }

    /// Changes the response's head as the decision has it.
    fn edit(&mut self, how: &Forwarding, more: Option<&More>) {
        let edits = more.map(|more| &more.response_edits).into_iter().chain([&how.response_edits]);
        for edits in edits.filter(|edits| !edits.0.is_empty()) {
            let facts = Facts {
                request: self.request,
                connection: self.connection,
                decided: &self.decided,
                record: Some(&self.record),
            };
            edits.apply(&mut self.reply.fields, &facts);
        }
    }

    /// One step of both bodies.
    fn poll_relay(
        &mut self,
        cx: &mut Context<'_>,
        lease: &mut Lease,
        download: &mut Pump,
        both: bool,
    ) -> Poll<Result<(), Failure>> {
        let uploaded = match self.upload.poll(cx, self.client, &mut lease.channel) {
            Poll::Ready(Err(PumpError::From(error))) => {
                return Poll::Ready(Err(Failure::of_request(&error)));
            }
            // The endpoint reads no more, but may still be answering.
            Poll::Ready(_) => true,
            Poll::Pending => false,
        };
        match download.poll(cx, &mut lease.channel, self.client) {
            Poll::Ready(Ok(())) if uploaded || !both => return Poll::Ready(Ok(())),
            Poll::Ready(Ok(())) | Poll::Pending => {}
            Poll::Ready(Err(PumpError::To(_))) => return Poll::Ready(Err(Failure::CLIENT_GONE)),
            Poll::Ready(Err(PumpError::From(error))) => {
                let mut failure = Failure::of_response(&error, false);
                failure.detail = "upstream_reset_after_response_started";
                return Poll::Ready(Err(failure));
            }
        }
        if both {
            if let Poll::Ready(failure) = self.poll_reset(cx, lease, download) {
                return Poll::Ready(Err(failure));
            }
        } else if self.poll_gone(cx).is_ready() {
            return Poll::Ready(Err(Failure::CLIENT_GONE));
        }
        self.hold(Some(&mut lease.channel), download.held())?;
        self.upload.moved |= std::mem::take(&mut download.moved);
        self.poll_late(cx).map(Err)
    }

    fn gone(&mut self) -> After {
        self.record.flag = Failure::CLIENT_GONE.flag;
        self.record.detail = Failure::CLIENT_GONE.detail;
        After::Abort
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        poll_fn(|cx| match self.client.poll_flush(cx) {
            Poll::Ready(flushed) => Poll::Ready(flushed.map_err(|_| Failure::CLIENT_GONE)),
            Poll::Pending => self.poll_late(cx).map(Err),
        })
        .await
    }

    /// One step of an answer of our own: sends what is `left` of its body.
    fn poll_answer(&mut self, cx: &mut Context<'_>, left: &mut Bytes) -> Poll<std::io::Result<()>> {
        while !left.is_empty() {
            let room = ready!(self.client.poll_room(cx, left.len()))?;
            let data = left.split_to(room);
            self.upload.moved = true;
            if left.is_empty() { self.client.send_last(data)? } else { self.client.send(data)? }
        }
        self.client.poll_flush(cx)
    }

    /// Drops what has come of a request's body that nobody takes any more: where that is all of it, the connection goes on after
    /// the answer. Nothing is waited for.
    async fn discard(&mut self) {
        if matches!(self.client, Channel::H1(_)) {
            poll_fn(|cx| {
                self.upload.discard(cx, self.client, DISCARDED);
                Poll::Ready(())
            })
            .await;
        }
    }

    async fn fail(&mut self, failure: Failure) -> After {
        if failure.status == 0 {
            return self.gone();
        }
        self.respond(&failure.response(Box::default()), failure.detail).await
    }

    /// Answers here.
    async fn respond(&mut self, response: &Response, detail: &'static str) -> After {
        self.record.flag = response.flag;
        self.record.detail = detail;
        self.reply.clear();
        let extended = self.request.extended;
        let body = local_head(&mut self.reply, response, self.request.is_grpc() && !extended);
        if extended && matches!(self.reply.status, 200..=299) {
            // To the client that would be the switch itself (RFC 8441 section 5).
            self.reply.status = 501;
        }
        self.record.status = self.reply.status;
        self.record.grpc_status = grpc_status(&self.reply.fields);
        let to_head = self.request.method() == "HEAD";
        // These have none, whatever was asked for (RFC 9110 sections 15.3.5, 15.3.6 and 15.4.5): a client would take it for
        // the next response's.
        let mut left =
            if to_head || matches!(self.reply.status, 204 | 205 | 304) { Bytes::new() } else { body };
        let framing = match left.len() {
            0 => Framing::None,
            length => Framing::Length(length as u64),
        };
        // Nor do some have a length (RFC 9110 section 8.6).
        let says_none = !(to_head || matches!(self.reply.status, 204 | 304));
        let close = self.hop.close || self.worker.drain.is_cancelled() || !self.upload.is_read();
        let sent = self.client.send_response(&self.reply, framing, says_none, close, false);
        self.record.sent = left.len() as u64;
        // A client that opens no window, or reads nothing, has as long for it as for anything else.
        (self.whole, self.this_try) = (Limit::default(), Limit::default());
        self.idle_deadline = Instant::now() + self.idle;
        let result = poll_fn(|cx| match self.poll_answer(cx, &mut left) {
            Poll::Ready(sent) => Poll::Ready(sent.map_err(|_| Failure::CLIENT_GONE)),
            Poll::Pending => self.poll_late(cx).map(Err),
        })
        .await;
        if let Err(failure) = result.and(sent.map_err(|_| Failure::CLIENT_GONE)) {
            (self.record.flag, self.record.detail) = (failure.flag, failure.detail);
            self.client.abort();
            return After::Abort;
        }
        if close { After::Close } else { After::Next }
    }
}
