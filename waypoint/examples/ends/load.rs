//! Requests, and a look at each answer.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::carry::Open;

/// What is asked, how often.
#[derive(Args, Debug)]
pub struct Asked {
    /// Connections, or tunnels
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// For so long
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// So many requests a second, each at its time, whether earlier ones are answered or not, as far as there are connections
    #[arg(long)]
    rate: Option<f64>,
    /// So many requests, and no more
    #[arg(long)]
    requests: Option<usize>,
    /// The authority
    #[arg(long, default_value = "cart.bench.example")]
    host: String,
    /// The path
    #[arg(long, default_value = "/")]
    path: String,
    /// Fields, as lines
    #[arg(long)]
    header: Vec<String>,
    /// Tokens, a line each; every request has another one
    #[arg(long)]
    tokens: Option<PathBuf>,
}

/// What the connections share.
struct Plan {
    before: String,
    tokens: Vec<String>,
    next: AtomicUsize,
    most: usize,
    begun: Instant,
    rate: Option<f64>,
    until: Instant,
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    micros: Vec<u32>,
    statuses: BTreeMap<String, usize>,
    errors: BTreeMap<String, usize>,
}

impl Plan {
    fn new(asked: &Asked) -> io::Result<Self> {
        let mut before = format!("GET {} HTTP/1.1\r\nhost: {}\r\n", asked.path, asked.host);
        for header in &asked.header {
            before.push_str(header);
            before.push_str("\r\n");
        }
        let tokens = match &asked.tokens {
            Some(file) => std::fs::read_to_string(file)?.lines().map(str::to_owned).collect(),
            None => Vec::new(),
        };
        let mut most = asked.requests.unwrap_or(usize::MAX);
        if asked.tokens.is_some() {
            most = most.min(tokens.len());
        }
        let begun = Instant::now();
        Ok(Self {
            before,
            tokens,
            next: AtomicUsize::new(0),
            most,
            begun,
            rate: asked.rate,
            until: begun + Duration::from_secs_f64(asked.seconds),
            stop: AtomicBool::new(false),
            seen: Mutex::default(),
        })
    }

    /// The next request's text, and when it is due; none when there have been enough.
    fn request(&self, text: &mut String) -> Option<Instant> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        #[allow(clippy::cast_precision_loss)]
        let due = match self.rate {
            Some(rate) => self.begun + Duration::from_secs_f64(number as f64 / rate),
            None => Instant::now(),
        };
        if number >= self.most || self.stop.load(Ordering::Relaxed) || due >= self.until {
            return None;
        }
        text.clear();
        text.push_str(&self.before);
        if let Some(token) = self.tokens.get(number) {
            text.push_str("authorization: Bearer ");
            text.push_str(token);
            text.push_str("\r\n");
        }
        text.push_str("\r\n");
        Some(due)
    }
}

/// A connection, and what was read of it.
struct Line {
    io: Box<dyn net::Io>,
    input: Vec<u8>,
}

impl Line {
    async fn open(open: &Open) -> io::Result<Self> {
        Ok(Self { io: open.open().await?, input: Vec::with_capacity(4096) })
    }

    /// Asks, and reads the whole answer; returns its status.
    async fn ask(&mut self, text: &str) -> io::Result<u16> {
        self.io.write_all(text.as_bytes()).await?;
        self.io.flush().await?;
        self.input.clear();
        loop {
            if self.io.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some((status, length)) = head(&self.input)?
                && self.input.len() >= length
            {
                return if self.input.len() == length {
                    Ok(status)
                } else {
                    Err(io::Error::other("more than an answer"))
                };
            }
        }
    }
}

/// The status, and the length of the whole answer, once its head is there.
fn head(bytes: &[u8]) -> io::Result<Option<(u16, usize)>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(&bytes[..end]).map_err(io::Error::other)?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| io::Error::other("an answer without a status"))?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok());
    let length = length.ok_or_else(|| io::Error::other("an answer without Content-Length"))?;
    Ok(Some((status, end + 4 + length)))
}

async fn connection(open: Open, plan: Arc<Plan>) {
    let (mut text, mut micros, mut statuses) = (String::new(), Vec::new(), BTreeMap::<u16, usize>::new());
    let ended: io::Result<()> = async {
        let mut line = Line::open(&open).await?;
        while let Some(due) = plan.request(&mut text) {
            tokio::time::sleep_until(due).await;
            // One that waited for a connection has waited.
            let status = line.ask(&text).await?;
            micros.push(u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX));
            *statuses.entry(status).or_default() += 1;
        }
        Ok(())
    }
    .await;
    let mut seen = plan.seen.lock().unwrap();
    seen.micros.extend(micros);
    for (status, count) in statuses {
        *seen.statuses.entry(u16::to_string(&status)).or_default() += count;
    }
    if let Err(error) = ended {
        *seen.errors.entry(error.to_string()).or_default() += 1;
    }
}

/// Prints what it came to: `requests` are those that were answered with 200.
pub async fn load(open: Open, asked: Asked) -> io::Result<()> {
    let plan = Arc::new(Plan::new(&asked)?);
    let begun = Instant::now();
    let mut all = JoinSet::new();
    for _ in 0..asked.connections {
        all.spawn(connection(open.clone(), Arc::clone(&plan)));
    }
    while all.join_next().await.is_some() {}
    let seconds = begun.elapsed().as_secs_f64();
    let mut seen = plan.seen.lock().unwrap();
    seen.micros.sort_unstable();
    let at = |share: f64| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let place = (seen.micros.len() as f64 * share) as usize;
        seen.micros.get(place.min(seen.micros.len().saturating_sub(1))).copied()
    };
    let out = serde_json::json!({
        "requests": seen.statuses.get("200").copied().unwrap_or_default(),
        "seconds": seconds,
        "statuses": seen.statuses,
        "errors": seen.errors,
        "p50_us": at(0.5),
        "p99_us": at(0.99),
        "longest_us": seen.micros.last(),
    });
    println!("{out}");
    Ok(())
}

/// Opens connections a few at a time, asks once on each, says so, and keeps them.
pub async fn hold(open: Open, asked: Asked) -> io::Result<()> {
    let plan = Plan::new(&Asked { seconds: 3600.0, ..asked })?;
    let (mut text, mut held) = (String::new(), Vec::new());
    let _ = plan.request(&mut text);
    for _ in 0..asked.connections {
        let mut line = Line::open(&open).await?;
        match line.ask(&text).await? {
            200 => {}
            status => return Err(io::Error::other(format!("answered with {status}"))),
        }
        line.input = Vec::new();
        held.push(line);
    }
    println!("{}", held.len());
    // Until nobody wants them any more.
    tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()))
        .await
        .map_err(io::Error::other)??;
    Ok(())
}

/// Asks until there is an answer, and prints when it came, in seconds of the Unix epoch.
pub async fn first(open: Open, asked: Asked) -> io::Result<()> {
    let plan = Plan::new(&asked)?;
    let mut text = String::new();
    while plan.request(&mut text).is_some() {
        let answered = async { Line::open(&open).await?.ask(&text).await };
        if let Ok(Ok(200)) = tokio::time::timeout(Duration::from_secs(1), answered).await {
            println!("{}", SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64());
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Err(io::ErrorKind::TimedOut.into())
}
