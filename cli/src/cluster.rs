//! The cluster as the commands see it: the API server by a kubeconfig, and what runs in pods by port forwarding, which
//! reaches their loopback addresses too and needs no more than the right to do so (`pods/portforward`).

mod kubeconfig;
mod objects;
mod proxy;
mod settings;

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use http::{Method, Request, header};
use hyper::body::Bytes;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::admin;

pub use kubeconfig::ClusterArgs;
pub use objects::{LeftOut, NamespaceLabels, Objects, labels_of, origin};
pub use settings::{MeshSettings, name_settings};

/// An answer of the API server, where --request-timeout says nothing, and a way to one of its pods and back.
const LIMIT: Duration = Duration::from_secs(30);
/// A connection to the API server.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Objects that are asked for at once.
const PAGE: usize = 500;
/// The label of what is deployed for a Gateway.
const GATEWAY_LABEL: &str = "gateway.networking.k8s.io/gateway-name";
/// That of what Culvert deployed, and no other that has Gateways in the cluster; as part of a query.
const OWN: &str = "app.kubernetes.io%2Fmanaged-by%3Dculvertd";
/// Who changes what these commands change, in the server's records.
const MANAGER: &str = "culvert";

/// A connection to a cluster.
pub struct Cluster {
    runtime: Runtime,
    client: Client,
    url: String,
    /// For an answer.
    limit: Duration,
    /// The namespace of the kubeconfig's context.
    pub namespace: String,
    /// The namespace that the mesh is installed in.
    pub system: String,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("url", &self.url).finish_non_exhaustive()
    }
}

/// A pod, as far as the commands look at it.
#[derive(Clone, Debug, Default)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node, empty while it has none.
    pub node: String,
    /// Its version, as its label says.
    pub version: String,
    /// Whether it is ready.
    pub ready: bool,
}

impl Cluster {
    /// Reads the kubeconfig. The server is not asked anything yet.
    ///
    /// # Errors
    /// There is no kubeconfig, or it can't be used.
    pub fn connect(args: &ClusterArgs) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (client, url, namespace) = runtime.block_on(async {
            let mut config = args.config().await?;
            config.connect_timeout = Some(CONNECT_LIMIT);
            let (url, namespace) = (config.cluster_url.to_string(), config.default_namespace.clone());
            anyhow::Ok((proxy::client(config)?, url, namespace))
        })?;
        let limit = Some(args.request_timeout).filter(|limit| !limit.is_zero()).unwrap_or(LIMIT);
        Ok(Self { runtime, client, url, limit, namespace, system: args.system_namespace.clone() })
    }

    /// `GET path`; `None` when there is no such thing.
    ///
    /// # Errors
    /// The server can't be reached, or refuses.
    pub fn find(&self, path: &str) -> Result<Option<Value>> {
        self.request(&Method::GET, path, None, "")
    }

    /// `GET path`, which must be there.
    ///
    /// # Errors
    /// As [`Cluster::find`], and when it is not there.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.find(path)?.with_context(|| format!("the API server at {} has no {path}", self.url))
    }

    /// Sees whether there is a namespace, as far as the user may know: who may not read namespaces is not held up.
    ///
    /// # Errors
    /// There is none.
    pub fn has_namespace(&self, name: &str) -> Result<()> {
        let could_be = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let found = if could_be { self.find(&format!("/api/v1/namespaces/{name}")) } else { Ok(None) };
        if matches!(found, Ok(None)) {
            bail!(
                "there is no namespace {name} in the cluster; `kubectl get namespaces` lists those there are"
            );
        }
        Ok(())
    }

    /// All items of a list, page by page; none where the server has no such kind.
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn list(&self, path: &str) -> Result<Vec<Value>> {
        let mut all = Vec::new();
        let mut next = String::new();
        let separator = if path.contains('?') { '&' } else { '?' };
        loop {
            let from = if next.is_empty() { String::new() } else { format!("&continue={next}") };
            let Some(mut page) = self.find(&format!("{path}{separator}limit={PAGE}{from}"))? else {
                return Ok(all);
            };
            if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
                all.extend(items);
            }
            next = page.pointer("/metadata/continue").and_then(Value::as_str).unwrap_or_default().to_owned();
            if next.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Applies an object at `path` (server-side apply; the fields that it has become this program's).
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn apply(&self, path: &str, object: &Value) -> Result<()> {
        let path = format!("{path}?fieldManager={MANAGER}&force=true");
        self.request(&Method::PATCH, &path, Some(object), "application/apply-patch+yaml")?;
        Ok(())
    }

    /// Merges `change` into the object at `path` (RFC 7386).
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn merge(&self, path: &str, change: &Value) -> Result<()> {
        let path = format!("{path}?fieldManager={MANAGER}");
        self.request(&Method::PATCH, &path, Some(change), "application/merge-patch+json")?;
        Ok(())
    }

    /// Deletes what is at `path`; whether it was there.
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn delete(&self, path: &str) -> Result<bool> {
        Ok(self.request(&Method::DELETE, path, None, "")?.is_some())
    }

    /// The API server's clock, as its answers tell (`Date`, RFC 9110 section 6.6.1).
    ///
    /// # Errors
    /// As [`Cluster::find`], and when it does not tell.
    pub fn server_time(&self) -> Result<SystemTime> {
        let request = Request::get("/version").body(kube::client::Body::empty())?;
        let answer = self.runtime.block_on(async { timeout(self.limit, self.client.send(request)).await });
        let answer = answer.with_context(|| self.unreachable())?.with_context(|| self.unreachable())?;
        let date = answer.headers().get(header::DATE).and_then(|d| d.to_str().ok());
        date.and_then(|d| httpdate::parse_http_date(d).ok())
            .context("the API server does not say what time it is")
    }

    fn request(
        &self,
        method: &Method,
        path: &str,
        body: Option<&Value>,
        form: &str,
    ) -> Result<Option<Value>> {
        let text = self.text(method, path, body, form)?;
        let parse = |t: String| serde_json::from_str(&t).with_context(|| format!("{path}: not JSON"));
        text.map(parse).transpose()
    }

    /// An answer as it is; `None` for 404.
    fn text(&self, method: &Method, path: &str, body: Option<&Value>, form: &str) -> Result<Option<String>> {
        let mut request = Request::builder().method(method.clone()).uri(path);
        if !form.is_empty() {
            request = request.header(header::CONTENT_TYPE, form);
        }
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = request.body(body)?;
        let answer =
            self.runtime.block_on(async { timeout(self.limit, self.client.request_text(request)).await });
        match answer {
            Ok(Ok(text)) => Ok(Some(text)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(None),
            Ok(Err(kube::Error::Api(status))) => {
                let next = match status.code {
                    401 => {
                        "; the context's credentials are not valid (any more): log in again, or name another --context"
                    }
                    403 => {
                        "; whoever may give rights in the cluster can give this one: kubectl auth can-i --list shows those you have"
                    }
                    _ => "",
                };
                bail!("the API server refused {method} {path}: {} ({}){next}", status.message, status.code)
            }
            Ok(Err(error)) => Err(anyhow!(error)).with_context(|| self.unreachable()),
            Err(_) => bail!("{}: no answer within {:?}", self.unreachable(), self.limit),
        }
    }

    fn unreachable(&self) -> String {
        format!("the API server at {} can't be asked (does kubectl reach it with this context?)", self.url)
    }

    /// A request to a port of a pod; its loopback addresses count.
    ///
    /// # Errors
    /// Forwarding is not allowed, or nobody listens there.
    pub fn ask_pod(
        &self,
        pod: &PodName,
        port: u16,
        method: Method,
        path: &str,
    ) -> Result<(http::StatusCode, Bytes)> {
        self.ask_pod_within(LIMIT, pod, port, method, path)
    }

    /// The same, within this time.
    ///
    /// # Errors
    /// As [`Cluster::ask_pod`].
    pub fn ask_pod_within(
        &self,
        limit: Duration,
        pod: &PodName,
        port: u16,
        method: Method,
        path: &str,
    ) -> Result<(http::StatusCode, Bytes)> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let place = || format!("port {port} of pod {}/{}", pod.namespace, pod.name);
        let exchange = async {
            let mut forwarder = pods.portforward(&pod.name, &[port]).await?;
            let stream = forwarder.take_stream(port).context("no stream")?;
            admin::exchange(stream, &format!("localhost:{port}"), method, path).await
        };
        match self.runtime.block_on(async { timeout(limit, exchange).await }) {
            Ok(answer) => answer.with_context(|| format!("{} can't be asked", place())),
            Err(_) => bail!("{} did not answer {path} within {limit:?}", place()),
        }
    }

    /// `GET path` of a port of a pod, as JSON; `None` for 404.
    ///
    /// # Errors
    /// As [`Cluster::ask_pod`], and when the answer is another.
    pub fn pod_json(&self, pod: &PodName, port: u16, path: &str) -> Result<Option<Value>> {
        self.pod_json_within(LIMIT, pod, port, path)
    }

    /// The same, within this time.
    ///
    /// # Errors
    /// As [`Cluster::pod_json`].
    pub fn pod_json_within(
        &self,
        limit: Duration,
        pod: &PodName,
        port: u16,
        path: &str,
    ) -> Result<Option<Value>> {
        let (status, bytes) = self.ask_pod_within(limit, pod, port, Method::GET, path)?;
        match status {
            http::StatusCode::OK => Ok(Some(
                serde_json::from_slice(&bytes).with_context(|| format!("{} {path}: not JSON", pod.name))?,
            )),
            http::StatusCode::NOT_FOUND => Ok(None),
            status => bail!("{} answered {path} with {status}", pod.name),
        }
    }

    /// The last lines of a pod's log; of the container that ran before, empty where none did.
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn log(&self, pod: &PodName, lines: u32, previous: bool) -> Result<String> {
        let PodName { namespace, name, .. } = pod;
        let path =
            format!("/api/v1/namespaces/{namespace}/pods/{name}/log?tailLines={lines}&previous={previous}");
        match self.text(&Method::GET, &path, None, "") {
            // The server refuses to show what there is not.
            Err(_) if previous => Ok(String::new()),
            found => Ok(found?.unwrap_or_default()),
        }
    }

    /// The mesh's own pods with the label `app`.
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn pods(&self, app: &str) -> Result<Vec<PodName>> {
        let path = format!("/api/v1/namespaces/{}/pods?labelSelector=app%3D{app}", self.system);
        let mut pods: Vec<_> = self.list(&path)?.iter().map(pod_name).collect();
        pods.sort_by(|a, b| (&a.node, &a.name).cmp(&(&b.node, &b.name)));
        Ok(pods)
    }

    /// The pods that Culvert deployed for waypoints: of a namespace, or all, and of the Gateway of a name, or of all.
    ///
    /// # Errors
    /// As [`Cluster::find`].
    pub fn waypoint_pods(&self, namespace: Option<&str>, gateway: Option<&str>) -> Result<Vec<PodName>> {
        let pods =
            namespace.map_or_else(|| "/api/v1/pods".to_owned(), |n| format!("/api/v1/namespaces/{n}/pods"));
        let wanted = gateway.map(|name| format!("%3D{name}")).unwrap_or_default();
        let path = format!("{pods}?labelSelector={}{wanted}%2C{OWN}", GATEWAY_LABEL.replace('/', "%2F"));
        let mut pods: Vec<_> = self.list(&path)?.iter().map(pod_name).collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Ok(pods)
    }
}

fn pod_name(pod: &Value) -> PodName {
    let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let deleted = pod.pointer("/metadata/deletionTimestamp").is_some();
    let is = |c: &Value, key: &str, value: &str| c.get(key).and_then(Value::as_str) == Some(value);
    let mut ready = conditions.filter(|c| is(c, "type", "Ready") && is(c, "status", "True"));
    PodName {
        namespace: text("/metadata/namespace"),
        name: text("/metadata/name"),
        node: text("/spec/nodeName"),
        version: text("/metadata/labels/app.kubernetes.io~1version"),
        ready: ready.next().is_some() && !deleted,
    }
}
