//! What the container runtime says in environment variables (CNI specification, section 2, "Parameters").

use std::ffi::OsString;

use crate::error::{CniError, Code};

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Add a container to the network.
    Add,
    /// Remove it.
    Del,
    /// See whether all is as ADD left it.
    Check,
    /// Remove what is left of all containers but those listed.
    Gc,
    /// Say whether ADD would work.
    Status,
    /// Say which versions are spoken.
    Version,
}

/// The pod that a container belongs to, from `CNI_ARGS`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pod {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; empty from runtimes that don't tell.
    pub uid: String,
}

/// The parameters, as far as the command has them; others are empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Environment {
    /// What is to be done.
    pub command: Command,
    /// The container's id.
    pub container: String,
    /// The path of its network namespace; DEL may come without.
    pub netns: String,
    /// The name of the interface.
    pub interface: String,
    /// `None` for a container of nothing that Kubernetes runs.
    pub pod: Option<Pod>,
}

impl Environment {
    /// Reads and checks the parameters that the command demands.
    pub fn read(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let text = |name: &str| match variable(name) {
            None => Ok(String::new()),
            Some(value) if value.len() > 64 << 10 => Err(wrong(format!("{name} is too long"))),
            Some(value) => value.into_string().map_err(|_| wrong(format!("{name} is not UTF-8"))),
        };
        let command = match text("CNI_COMMAND")?.as_str() {
            "ADD" => Command::Add,
            "DEL" => Command::Del,
            "CHECK" => Command::Check,
            "GC" => Command::Gc,
            "STATUS" => Command::Status,
            "VERSION" => Command::Version,
            "" => {
                let message = "CNI_COMMAND is not set: this is a CNI plugin, which container runtimes call";
                return Err(wrong(message.to_owned()));
            }
            other => return Err(wrong(format!("CNI_COMMAND={other:?} is not known"))),
        };
        if matches!(command, Command::Gc | Command::Status | Command::Version) {
            let (container, netns, interface) = Default::default();
            return Ok(Self { command, container, netns, interface, pod: None });
        }
        let read = Self {
            command,
            container: text("CNI_CONTAINERID")?,
            netns: text("CNI_NETNS")?,
            interface: text("CNI_IFNAME")?,
            pod: pod(&text("CNI_ARGS")?),
        };
        if !is_container_id(&read.container) {
            return Err(wrong(format!("CNI_CONTAINERID={:?} is no container id", read.container)));
        }
        if !is_interface(&read.interface) {
            return Err(wrong(format!("CNI_IFNAME={:?} is no name of an interface", read.interface)));
        }
        if read.netns.is_empty() && command != Command::Del {
            return Err(wrong("CNI_NETNS is not set".to_owned()));
        }
        Ok(read)
    }
}

fn wrong(message: String) -> CniError {
    CniError::new(Code::Environment, message)
}

/// Starts with a letter or digit; then also `_`, `.` and `-`.
fn is_container_id(id: &str) -> bool {
    let first = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && id.len() <= 256 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// As the kernel takes it (`dev_valid_name`).
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace())
}

/// `IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=...`.
fn pod(arguments: &str) -> Option<Pod> {
    let mut pod = Pod::default();
    for (key, value) in arguments.split(';').filter_map(|pair| pair.split_once('=')) {
        let field = match key {
            "K8S_POD_NAMESPACE" => &mut pod.namespace,
            "K8S_POD_NAME" => &mut pod.name,
            "K8S_POD_UID" => &mut pod.uid,
            _ => continue,
        };
        value.clone_into(field);
    }
    (!pod.namespace.is_empty() && !pod.name.is_empty()).then_some(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, CniError> {
        let found = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        };
        Environment::read(&found)
    }

    #[test]
    fn the_pod_is_in_the_arguments() {
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=1-2;X";
        let read = read(&[
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "abc"),
            ("CNI_NETNS", "/run/netns/x"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", arguments),
        ]);
        let pod = read.unwrap().pod.unwrap();
        assert_eq!((&*pod.namespace, &*pod.name, &*pod.uid), ("shop", "web-0", "1-2"));
        assert_eq!(super::pod("K8S_POD_NAME=web"), None);
        assert_eq!(super::pod(""), None);
    }

    #[test]
    fn each_command_demands_its_own() {
        assert!(read(&[("CNI_COMMAND", "STATUS")]).is_ok());
        assert!(read(&[("CNI_COMMAND", "GC")]).is_ok());
        let base = [("CNI_CONTAINERID", "abc"), ("CNI_IFNAME", "eth0")];
        let with = |command| [&[("CNI_COMMAND", command)][..], &base].concat();
        assert!(read(&with("DEL")).is_ok(), "DEL comes without a namespace too");
        for command in ["ADD", "CHECK", "NOTHING", ""] {
            let error = read(&with(command)).unwrap_err();
            assert!(error.to_json(None).contains("\"code\":4"), "{command}");
        }
        for (id, name) in
            [("", "eth0"), ("a/b", "eth0"), ("-a", "eth0"), ("a", ""), ("a", "a/b"), ("a", "a b")]
        {
            let pairs = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", id), ("CNI_IFNAME", name)];
            assert!(read(&pairs).is_err(), "{id:?} {name:?}");
        }
    }
}
