//! The network configuration on standard input (CNI specification, section 1).

use serde_json::{Map, Value};

use crate::error::{CniError, Code};

/// The versions of the specification that are spoken, the oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", NEWEST];
/// The newest of them.
pub const NEWEST: &str = "1.1.0";

const SOCKET: &str = "/var/run/culvert-cni/plugin.sock";
const EXCLUDED: [&str; 2] = ["kube-system", "culvert-system"];

/// What of the configuration concerns this plugin.
#[derive(Clone, PartialEq, Debug)]
pub struct Network {
    /// One of [`VERSIONS`].
    pub version: &'static str,
    /// Where the agent listens: `agentSocket`.
    pub socket: String,
    /// Namespaces whose pods are never in the mesh, and start without the agent: `excludeNamespaces`.
    pub excluded: Vec<String>,
    /// What the plugin before has done: `prevResult`.
    pub previous: Option<Value>,
    /// GC: the attachments that stay, `cni.dev/valid-attachments`.
    pub valid_attachments: Option<Value>,
}

/// The version that a configuration names, whatever else is in it, for the words of an error.
pub fn version_of(input: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(input).ok()?;
    Some(value.get("cniVersion")?.as_str()?.to_owned())
}

impl Network {
    /// Reads the configuration.
    pub fn read(input: &[u8]) -> Result<Self, CniError> {
        let decode = |message: String| CniError::new(Code::Decode, message);
        let value: Value = serde_json::from_slice(input)
            .map_err(|error| decode(format!("the network configuration is not JSON: {error}")))?;
        let Value::Object(mut fields) = value else {
            return Err(decode("the network configuration is no JSON object".to_owned()));
        };
        let named = fields.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
        let version = VERSIONS.into_iter().find(|known| *known == named).ok_or_else(|| {
            let message = format!("cniVersion {named:?} is not spoken by culvert-cni");
            CniError::new(Code::IncompatibleVersion, message)
                .details(format!("use one of {}", VERSIONS.join(", ")))
        })?;
        let socket = match fields.get("agentSocket") {
            None => SOCKET.to_owned(),
            Some(Value::String(path)) if path.starts_with('/') => path.clone(),
            Some(other) => return Err(invalid("agentSocket", other, "an absolute path")),
        };
        let excluded = match fields.get("excludeNamespaces") {
            None => EXCLUDED.map(str::to_owned).to_vec(),
            Some(value) => {
                strings(value).ok_or_else(|| invalid("excludeNamespaces", value, "a list of namespaces"))?
            }
        };
        Ok(Self {
            version,
            socket,
            excluded,
            previous: take(&mut fields, "prevResult"),
            valid_attachments: take(&mut fields, "cni.dev/valid-attachments"),
        })
    }
}

fn take(fields: &mut Map<String, Value>, name: &str) -> Option<Value> {
    fields.remove(name).filter(|value| !value.is_null())
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

fn invalid(field: &str, found: &Value, wanted: &str) -> CniError {
    let found: String = found.to_string().chars().take(100).collect();
    CniError::new(Code::InvalidNetwork, format!("{field} must be {wanted}; it is {found}"))
}
