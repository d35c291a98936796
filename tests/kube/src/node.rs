//! A node from outside: its namespaces and link, starting, rebooting, and running things in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};

use crate::lab::{CONTROL_PLANE_IP, CONTROL_PLANE_IP6, Lab, NODES, Node};
use crate::node_init::{DISK, cgroup_trees};
use crate::process::{Recorded, children, finish, output, pid_of, program};
use crate::report::wait_for;

/// Directories of the machine that had to be made, to mount a node's own on: one a line.
const MADE: &str = "made-directories";

/// Makes the network and starts the node. It is up when the API server says so.
///
/// # Errors
/// A namespace, a link or the process can't be made.
pub fn start(lab: &Lab, node: &Node) -> Result<()> {
    mount_points(lab)?;
    connect(lab, node)?;
    let this = kept_program(lab)?;
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{}", lab.netns(node)))
        .args(["unshare", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child"])
        .arg(this)
        .args(["node-init", node.name]);
    command.args(["--cluster", &lab.number.to_string()]);
    Recorded::start(lab, node.name, &command).map(drop)
}

/// This program, as it is now: cargo may put another in its place before a node starts again.
fn kept_program(lab: &Lab) -> Result<PathBuf> {
    let kept = lab.run("kube-tests");
    if !kept.exists() {
        let this = std::env::current_exe().context("finding this program")?;
        fs::create_dir_all(lab.run("")).context("making its directory")?;
        fs::copy(&this, &kept).with_context(|| format!("copying {}", this.display()))?;
    }
    Ok(kept)
}

/// Ends all that runs on it, as when power fails: its memory, `/run` and network are gone, its disk stays.
///
/// # Errors
/// It does not end.
pub fn power_off(lab: &Lab, node: &Node) -> Result<()> {
    // The death of `unshare` kills process 1, and with it all of the process namespace.
    Recorded::named(lab, node.name).end()?;
    disconnect(lab, node)?;
    remove_cgroups(lab, node)
}

/// Off and on again.
///
/// # Errors
/// It does not come up.
pub fn reboot(lab: &Lab, node: &Node) -> Result<()> {
    power_off(lab, node)?;
    start(lab, node)
}

fn connect(lab: &Lab, node: &Node) -> Result<()> {
    let (netns, outer) = (lab.netns(node), lab.control_plane_netns());
    output("ip", &["netns", "add", &netns])?;
    let outside = |words: &[&str]| output("ip", &[&["-n", outer.as_str()], words].concat());
    let inside = |words: &[&str]| output("ip", &[&["-n", netns.as_str()], words].concat());
    outside(&["link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
    outside(&["link", "set", node.link, "master", "br0", "up"])?;
    inside(&["link", "set", "lo", "up"])?;
    inside(&["addr", "add", &format!("{}/24", node.ip), "dev", "eth0"])?;
    // Nobody else has the address, and what has to be looked for first is of no use at once.
    inside(&["addr", "add", &format!("{}/64", node.ip6), "dev", "eth0", "nodad"])?;
    inside(&["link", "set", "eth0", "up"])?;
    inside(&["route", "add", "default", "via", CONTROL_PLANE_IP])?;
    inside(&["-6", "route", "add", "default", "via", CONTROL_PLANE_IP6])?;
    for other in NODES.iter().filter(|other| *other != node) {
        inside(&["route", "add", other.pod_cidr, "via", other.ip])?;
        inside(&["-6", "route", "add", other.pod_cidr6, "via", other.ip6])?;
    }
    outside(&["route", "replace", node.pod_cidr, "via", node.ip])?;
    outside(&["-6", "route", "replace", node.pod_cidr6, "via", node.ip6])?;
    Ok(())
}

/// Deletes the node's network, if it is there. A namespace lives on until its last process is gone.
///
/// # Errors
/// It can't be deleted.
pub fn disconnect(lab: &Lab, node: &Node) -> Result<()> {
    // The pair goes with either end, and at once; the namespace's end would come later.
    let _ = output("ip", &["-n", &lab.control_plane_netns(), "link", "delete", node.link]);
    delete_netns(&lab.netns(node))
}

/// Deletes a network namespace, if it is there.
///
/// # Errors
/// It can't be deleted.
pub fn delete_netns(name: &str) -> Result<()> {
    if Path::new("/run/netns").join(name).exists() {
        output("ip", &["netns", "delete", name])?;
    }
    Ok(())
}

/// The host's process id of process 1 of the node.
///
/// # Errors
/// The node is off.
pub fn init(lab: &Lab, node: &Node) -> Result<u32> {
    let unshare = Recorded::named(lab, node.name).pid().with_context(|| format!("{} is off", node.name))?;
    children(unshare).first().copied().with_context(|| format!("{} has no process 1", node.name))
}

/// A command inside the node.
///
/// # Errors
/// The node is off.
pub fn shell(lab: &Lab, node: &Node, words: &[&str]) -> Result<Command> {
    let mut command = Command::new("nsenter");
    let init = init(lab, node)?.to_string();
    command.args(["--target", &init, "--mount", "--uts", "--net", "--pid", "--ipc", "--"]).args(words);
    Ok(command)
}

/// Runs a command inside the node.
///
/// # Errors
/// It fails.
pub fn run(lab: &Lab, node: &Node, words: &[&str]) -> Result<String> {
    finish(&mut shell(lab, node, words)?)
}

/// A command in a pod's network namespace and outside of its containers, which costs neither the API server nor the node's daemons
/// anything.
///
/// # Errors
/// No process of the pod runs on the node.
pub fn beside_pod(lab: &Lab, node: &Node, uid: &str, program: &Path) -> Result<Command> {
    let pod = format!("pod{uid}");
    let found = cgroup_trees().into_iter().find_map(|tree| {
        // The pod's group is one of these, or below that of its quality of service.
        let pods = tree.join(lab.cgroup(node)).join("kubepods");
        ["", "burstable", "besteffort"].map(|of| pods.join(of).join(&pod)).into_iter().find_map(|group| {
            // A container's group is below it. The oldest process is the one that keeps the namespace.
            let containers =
                fs::read_dir(group).ok()?.flatten().map(|entry| entry.path().join("cgroup.procs"));
            let listed = containers.filter_map(|procs| fs::read_to_string(procs).ok());
            listed
                .flat_map(|text| text.lines().filter_map(|pid| pid.parse::<u32>().ok()).collect::<Vec<_>>())
                .min()
        })
    });
    let pid = found.with_context(|| format!("no process of {pod} runs on {}", node.name))?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{pid}/ns/net")).arg(program);
    Ok(command)
}

/// Kills one of the node's daemons (`containerd`, `kubelet`, `kube-proxy`); the node starts it again. Returns whether it
/// ran.
///
/// # Errors
/// The node is off.
pub fn kill_daemon(lab: &Lab, node: &Node, daemon: &str) -> Result<bool> {
    // Kubernetes' programs are one, called by other names.
    let is = |pid: &u32| {
        let called = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let called = called.split('\0').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
        called == daemon || program(*pid).is_some_and(|p| p == daemon)
    };
    let Some(pid) = children(init(lab, node)?).into_iter().find(is) else {
        return Ok(false);
    };
    kill(pid_of(pid)?, Signal::SIGKILL).with_context(|| format!("killing {daemon} of {}", node.name))?;
    Ok(true)
}

/// Imports an image's archive into the node's containerd.
///
/// # Errors
/// containerd refuses it.
pub fn import(lab: &Lab, node: &Node, archive: &Path) -> Result<()> {
    let archive = archive.canonicalize().with_context(|| format!("finding {}", archive.display()))?;
    run(lab, node, &["ctr", "-n", "k8s.io", "images", "import", &archive.display().to_string()]).map(drop)
}

fn mount_points(lab: &Lab) -> Result<()> {
    let record = lab.run(MADE);
    for directory in DISK {
        let missing: Vec<&Path> = Path::new(directory).ancestors().take_while(|p| !p.exists()).collect();
        for path in missing.iter().rev() {
            let mut made = fs::read_to_string(&record).unwrap_or_default();
            made.push_str(&format!("{}\n", path.display()));
            lab.write(&record, &made)?;
            fs::create_dir(path).with_context(|| format!("making {}", path.display()))?;
        }
    }
    Ok(())
}

/// Removes what the nodes left on the machine: cgroups, and the empty directories that were made for them.
///
/// # Errors
/// A cgroup still has processes.
pub fn sweep(lab: &Lab) -> Result<()> {
    NODES.iter().try_for_each(|node| remove_cgroups(lab, node))?;
    let made = fs::read_to_string(lab.run(MADE)).unwrap_or_default();
    for path in made.lines().rev() {
        // Somebody else may have put something into it: then it is theirs.
        let _ = fs::remove_dir(path);
    }
    Ok(())
}

fn remove_cgroups(lab: &Lab, node: &Node) -> Result<()> {
    for tree in cgroup_trees() {
        let group = tree.join(lab.cgroup(node));
        // The kernel takes a moment to see that the last process is gone.
        wait_for(&format!("the end of {}", group.display()), Duration::from_secs(10), || {
            Ok(remove_groups(&group).map_err(|e| e.to_string()))
        })?;
    }
    Ok(())
}

/// Deletes a cgroup with those below it; the files in it are the kernel's.
fn remove_groups(group: &Path) -> std::io::Result<()> {
    let Ok(entries) = fs::read_dir(group) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
