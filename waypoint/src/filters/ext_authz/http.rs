//! Asking over HTTP: the request's head, at a path of the authorizer's; 200 allows, 5xx is no answer, any other status is
//! the refusal that the client gets.

use std::time::Duration;

use model::http::{BodyCheck, HttpCheck};

use super::{Answer, Changes, Shown, listed, permitted};
use crate::http::decide::{Connection, Edit, Endpoints, Flag, Response, Value};
use crate::http::head::{Fields, RequestHead};
use crate::upstream::call::{self, CallError, call};

/// Headers that a client gets with a refusal beside those that are listed, as Envoy has it.
const ALWAYS: [&str; 4] = ["content-type", "location", "set-cookie", "www-authenticate"];

pub(super) async fn ask(
    endpoints: &dyn Endpoints,
    check: &HttpCheck,
    request: &RequestHead,
    connection: &Connection,
    body: Option<(BodyCheck, Shown)>,
    limit: Duration,
) -> Result<Answer, CallError> {
    let body = body.map(|(_, shown)| shown);
    let question = question(check, request, body.as_ref());
    let bytes = body.map(|shown| shown.bytes).unwrap_or_default();
    let answer = call(endpoints, connection, &question, bytes, limit).await?;
    Ok(judged(check, answer))
}

/// The request that the authorizer gets.
fn question(check: &HttpCheck, request: &RequestHead, body: Option<&Shown>) -> RequestHead {
    let mut question = RequestHead::default();
    question.set_method(request.method());
    question.set_authority(request.authority());
    let prefix = check.path_prefix.as_deref().unwrap_or_default();
    question.set_target(&format!("{prefix}{}", request.target()));
    for (name, value) in request.fields.iter() {
        let lower = String::from_utf8_lossy(name).to_ascii_lowercase();
        if (lower == "authorization" || listed(&check.request_headers, &lower)) && permitted(&lower, value) {
            question.fields.push(name, value);
        }
    }
    for (name, value) in &check.additional_headers {
        if permitted(name, value.as_bytes()) {
            question.fields.set(name.as_bytes(), value.as_bytes());
        }
    }
    if let Some(shown) = body {
        let partial: &[u8] = if shown.whole { b"false" } else { b"true" };
        question.fields.set(b"x-envoy-auth-partial-body", partial);
    }
    question
}

fn judged(check: &HttpCheck, answer: call::Answer) -> Answer {
    let status = answer.head.status;
    if status == 200 {
        let mut changes = Changes::default();
        for (name, value) in fields(&answer.head.fields) {
            if listed(&check.to_upstream_on_allow, &name) {
                changes.request.push(Edit::Set(name.as_str().into(), Value::Plain(value.into())));
            }
            if listed(&check.to_downstream_on_allow, &name) {
                changes.response.push(Edit::Add(name.as_str().into(), Value::Plain(value.into())));
            }
        }
        return Answer::Allowed(changes);
    }
    if status >= 500 {
        return Answer::Failed(format!("it answered with the status {status}"));
    }
    let list = &check.to_downstream_on_deny;
    let kept = |name: &str| list.is_empty() || listed(list, name) || ALWAYS.contains(&name);
    let fields = fields(&answer.head.fields).filter(|(name, _)| kept(name) && name != "date");
    // What is no text can't be passed on in a response of ours.
    let text = |(name, value): (String, &[u8])| {
        Some((name.into_boxed_str(), std::str::from_utf8(value).ok()?.into()))
    };
    Answer::Denied(Response {
        status,
        fields: fields.filter_map(text).collect(),
        body: answer.body,
        flag: Flag::Decided("UAEX"),
    })
}

/// The fields that may be passed on, their names in lower case.
fn fields(all: &Fields) -> impl Iterator<Item = (String, &[u8])> {
    let lower = all.iter().map(|(name, value)| (String::from_utf8_lossy(name).to_ascii_lowercase(), value));
    lower.filter(|(name, value)| permitted(name, value))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]

    use bytes::Bytes;
    use model::StringMatch;

    use super::*;
    use crate::http::head::ResponseHead;

    fn check() -> HttpCheck {
        let list = |names: &[&str]| names.iter().map(|name| StringMatch::parse(name)).collect();
        HttpCheck {
            path_prefix: Some("/check".into()),
            request_headers: list(&["x-user", "x-b3-*"]),
            additional_headers: [("x-mesh".into(), "culvert".into())].into(),
            to_upstream_on_allow: list(&["x-principal", "content-length"]),
            to_downstream_on_deny: list(&["x-why"]),
            to_downstream_on_allow: list(&["x-cache*"]),
        }
    }

    fn shown(fields: &Fields) -> Vec<String> {
        fields.iter().map(|(n, v)| String::from_utf8_lossy(&[n, b": ", v].concat()).into_owned()).collect()
    }

    #[test]
    fn an_authorizer_gets_the_headers_that_are_listed() {
        let mut request = RequestHead::default();
        request.set_method("POST");
        request.set_authority("shop");
        request.set_target("/buy?n=1");
        for (name, value) in [
            ("X-User", "anna"),
            ("x-b3-traceid", "1"),
            ("Cookie", "secret"),
            ("Authorization", "Bearer t"),
            ("x-mesh", "mine"),
            ("content-length", "3"),
        ] {
            request.fields.push(name.as_bytes(), value.as_bytes());
        }
        let got = question(&check(), &request, Some(&Shown { bytes: Bytes::new(), whole: false }));
        assert_eq!((got.method(), got.authority(), got.target()), ("POST", "shop", "/check/buy?n=1"));
        let wanted = [
            "X-User: anna",
            "x-b3-traceid: 1",
            "Authorization: Bearer t",
            "x-mesh: culvert",
            "x-envoy-auth-partial-body: true",
        ];
        assert_eq!(shown(&got.fields), wanted);
    }

    fn answer(status: u16, fields: &[(&str, &str)]) -> call::Answer {
        let mut head = ResponseHead { status, ..ResponseHead::default() };
        for (name, value) in fields {
            head.fields.push(name.as_bytes(), value.as_bytes());
        }
        call::Answer { head, body: Bytes::from_static(b"why"), trailers: None }
    }

    #[test]
    fn what_an_authorizer_answers_is_kept_as_far_as_it_is_listed() {
        let fields = [
            ("X-Principal", "anna"),
            ("Content-Length", "99"),
            ("X-Cache-A", "hit"),
            ("X-Why", "no"),
            ("Set-Cookie", "a=1"),
            ("Server", "authz"),
        ];
        let Answer::Allowed(changes) = judged(&check(), answer(200, &fields)) else { panic!("refused") };
        let mut request = RequestHead::default();
        request.fields.push(b"x-principal", b"mine");
        changes.apply(&mut request);
        assert_eq!(shown(&request.fields), ["x-principal: anna"]);
        assert!(matches!(&changes.response[..], [Edit::Add(name, _)] if &**name == "x-cache-a"));
        let Answer::Denied(response) = judged(&check(), answer(302, &fields)) else { panic!("allowed") };
        let names: Vec<&str> = response.fields.iter().map(|(name, _)| &**name).collect();
        assert_eq!((response.status, names), (302, vec!["x-why", "set-cookie"]));
        assert_eq!(&response.body[..], b"why");
        assert!(matches!(judged(&check(), answer(503, &fields)), Answer::Failed(_)));
        // 204 is not what allows, in Envoy either.
        assert!(matches!(judged(&check(), answer(204, &fields)), Answer::Denied(_)));
    }
}
