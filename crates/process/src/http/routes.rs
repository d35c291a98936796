//! Which path is answered by what.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::{Method, Request, Response, StatusCode};

/// What a handler returns.
pub type HandlerFuture = Pin<Box<dyn Future<Output = Response> + Send>>;

type Handler = Arc<dyn Fn(Request) -> HandlerFuture + Send + Sync>;

#[derive(Clone)]
struct Route {
    help: &'static str,
    handler: Handler,
    /// `None` for the server's limit.
    time: Option<Duration>,
}

/// Routes by path and method. `GET` routes answer `HEAD` too.
#[derive(Clone, Default)]
pub struct Routes {
    paths: Arc<BTreeMap<&'static str, Vec<(Method, Route)>>>,
    title: &'static str,
}

impl std::fmt::Debug for Routes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.paths.keys()).finish()
    }
}

impl Routes {
    /// No routes. With a `title`, `/` lists the ones that will be added.
    #[must_use]
    pub fn new(title: &'static str) -> Self {
        Self { title, ..Self::default() }
    }

    /// Adds a route for `GET`; `help` is one line for the index.
    #[must_use]
    pub fn get<F, R>(self, path: &'static str, help: &'static str, handler: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Response> + Send + 'static,
    {
        self.add(Method::GET, path, help, None, handler)
    }

    /// Adds a route for `POST`.
    #[must_use]
    pub fn post<F, R>(self, path: &'static str, help: &'static str, handler: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Response> + Send + 'static,
    {
        self.add(Method::POST, path, help, None, handler)
    }

    /// Adds a route for `GET` whose handler may run as long as `time`.
    #[must_use]
    pub fn get_slow<F, R>(self, path: &'static str, help: &'static str, time: Duration, handler: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Response> + Send + 'static,
    {
        self.add(Method::GET, path, help, Some(time), handler)
    }

    fn add<F, R>(
        mut self,
        method: Method,
        path: &'static str,
        help: &'static str,
        time: Option<Duration>,
        handler: F,
    ) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Response> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request| Box::pin(handler(request)));
        let methods = Arc::make_mut(&mut self.paths).entry(path).or_default();
        methods.retain(|(known, _)| *known != method); // the last one counts
        methods.push((method, Route { help, handler, time }));
        self
    }

    pub(super) async fn answer(&self, request: Request, handler_time: Duration) -> Response {
        let Some(methods) = self.paths.get(request.path()) else {
            return if request.path() == "/" && !self.title.is_empty() {
                self.index()
            } else {
                Response::text(StatusCode::NOT_FOUND, "no such page\n")
            };
        };
        // A HEAD is answered as a GET; hyper leaves the body out.
        let wanted = if *request.method() == Method::HEAD { &Method::GET } else { request.method() };
        let Some((_, route)) = methods.iter().find(|(method, _)| method == wanted) else {
            let allowed: Vec<&str> = methods.iter().map(|(m, _)| m.as_str()).collect();
            let text = format!("use {} here\n", allowed.join(" or "));
            return Response::text(StatusCode::METHOD_NOT_ALLOWED, text);
        };
        // In a task of its own, so that a panic ends this request only.
        let task = tokio::spawn((route.handler)(request));
        let abort = AbortOnDrop(task.abort_handle());
        let outcome = tokio::time::timeout(route.time.unwrap_or(handler_time), task).await;
        drop(abort);
        match outcome {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => {
                Response::text(StatusCode::INTERNAL_SERVER_ERROR, "the handler failed, see the log\n")
            }
            Err(_) => Response::text(StatusCode::SERVICE_UNAVAILABLE, "the handler took too long\n"),
        }
    }

    fn index(&self) -> Response {
        let mut text = format!("{}\n\n", self.title);
        for (path, methods) in self.paths.iter() {
            for (method, route) in methods {
                let _ = writeln!(text, "{method:<5} {path:<24} {}", route.help); // writing to a String does not fail
            }
        }
        Response::text(StatusCode::OK, text)
    }
}

/// Ends the handler when its client goes.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
