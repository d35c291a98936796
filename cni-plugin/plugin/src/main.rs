//! `culvert-cni`: the CNI plugin of a Culvert mesh, chained behind the node's primary plugin.
//!
//! It knows little: for each pod that the container runtime adds it asks the node agent over a Unix socket, and waits
//! until the agent has put the pod into the mesh, or says that it is none of the mesh's. The result of the plugin before
//! is passed on as it came.
//!
//! Invariants:
//! * a pod that could be the mesh's never starts unprotected: while the agent is away, or can't do it, ADD fails with
//!   "try again later", which the kubelet does, and shows the reason as an event of the pod. Only pods of the namespaces
//!   in `excludeNamespaces`, which are never in the mesh, start without the agent: what the agent itself needs;
//! * DEL and GC let go and never stand in the way of a clean-up;
//! * everything has a limit: what is read from standard input and from the agent, and every wait.
#![forbid(unsafe_code)]

mod agent;
mod command;
mod environment;
mod error;
mod network;
mod result;

use std::io::{Read, Write};
use std::process::ExitCode;

use error::{CniError, Code};

/// What a network configuration may have, bytes. A list of all attachments of a full node is some hundred kilobytes.
const INPUT_LIMIT: u64 = 4 << 20;

fn main() -> ExitCode {
    let (output, code) = match run() {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err((version, error)) => (error.to_json(version.as_deref()), ExitCode::FAILURE),
    };
    if output.is_empty() {
        return code;
    }
    // A runtime that has closed our output knows our exit status.
    let _ = std::io::stdout().lock().write_all(output.as_bytes());
    code
}

/// What to print; or an error, and the version of the specification to word it in, if that is known.
fn run() -> Result<String, (Option<String>, CniError)> {
    let variables = |name: &str| std::env::var_os(name);
    let environment = environment::Environment::read(&variables).map_err(|error| (None, error))?;
    let mut input = Vec::new();
    std::io::stdin()
        .lock()
        .take(INPUT_LIMIT + 1)
        .read_to_end(&mut input)
        .map_err(|error| (None, CniError::new(Code::Io, format!("reading standard input: {error}"))))?;
    if input.len() as u64 > INPUT_LIMIT {
        let message = format!("the network configuration has more than {INPUT_LIMIT} bytes");
        return Err((None, CniError::new(Code::Decode, message)));
    }
    command::execute(&environment, &input)
}
