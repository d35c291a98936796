//! What is missing is named, with the package or capability to add.

use std::ffi::OsString;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::{fs, io};

use caps::{CapSet, Capability};
use capture::{Backend, Error, Include, Missing, PortRange, Rules, Tools, probe, select};
use harness::netns::{Host, Lab, root_or_skip};

use crate::dns::{ask, resolver, start_server};
use crate::fixture::{Case, block_on, dial, start_app, two_nodes};

/// A directory with links to some programs, and the programs that those run.
fn only(programs: &[&str]) -> (tempfile::TempDir, Tools) {
    let directory = tempfile::tempdir().unwrap();
    for program in programs {
        let real = ["/usr/sbin", "/sbin", "/usr/bin"].iter().map(|dir| format!("{dir}/{program}"));
        let real = real.into_iter().find(|path| fs::exists(path).unwrap()).unwrap();
        symlink(real, directory.path().join(program)).unwrap();
    }
    let path: OsString = directory.path().into();
    (directory, Tools::in_path(&path))
}

#[test]
fn a_missing_program_is_named_with_its_package() {
    let (_directory, tools) = only(&[]);
    for (backend, tool, package) in [
        (Backend::Nftables, "nft", "nftables"),
        (Backend::IptablesNft, "iptables-nft-save", "iptables"),
        (Backend::IptablesLegacy, "iptables-legacy-save", "iptables"),
    ] {
        match probe(backend, &tools) {
            Err(missing @ Missing::Tool { .. }) => {
                let said = missing.to_string();
                assert!(said.contains(tool) && said.contains(&format!("package {package}")), "{said}");
            }
            other => panic!("{backend}: {other:?}"),
        }
    }
    let tools = tools.with_bpf_file_system(Path::new("/nowhere"));
    let none = select(None, &tools).unwrap_err();
    assert_eq!(none.tried.len(), 4);
    assert!(none.to_string().contains("install the package nftables"), "{none}");
}

#[test]
fn the_choice_is_explained() {
    if !root_or_skip("the_choice_is_explained") {
        return;
    }
    let all = select(None, &Tools::default()).unwrap();
    assert_eq!(all.capture.backend(), Backend::Nftables);
    assert!(all.reason.starts_with("nftables (nftables v"), "{}", all.reason);

    let nft_flavour =
        ["iptables-nft-save", "iptables-nft-restore", "ip6tables-nft-save", "ip6tables-nft-restore"];
    let (_directory, tools) = only(&nft_flavour);
    let second = select(None, &tools).unwrap();
    assert_eq!(second.capture.backend(), Backend::IptablesNft);
    assert!(
        second.reason.contains("nft is not installed; install the package nftables"),
        "{}",
        second.reason
    );

    let legacy = nft_flavour.map(|name| name.replace("nft", "legacy"));
    let (_directory, tools) = only(&legacy.each_ref().map(String::as_str));
    assert_eq!(select(None, &tools).unwrap().capture.backend(), Backend::IptablesLegacy);

    // IPv6 would go uncaptured: better nothing than half.
    let (_directory, tools) = only(&["iptables-nft-save", "iptables-nft-restore"]);
    let half = select(Some(Backend::IptablesNft), &tools).unwrap_err();
    assert!(half.to_string().contains("ip6tables-nft-save"), "{half}");
}

/// Tools of which iptables-restore does not know the table `nat`, from the moment when the file `broken` is in the directory.
fn without_nat(flavour: &str) -> (tempfile::TempDir, Tools) {
    let programs = ["iptables", "ip6tables"]
        .map(|name| ["save", "restore"].map(|end| format!("{name}-{flavour}-{end}")));
    let programs: Vec<_> = programs.as_flattened().iter().map(String::as_str).collect();
    let (directory, tools) = only(&programs);
    let restore = directory.path().join(format!("iptables-{flavour}-restore"));
    let real = fs::read_link(&restore).unwrap();
    fs::remove_file(&restore).unwrap();
    let broken = directory.path().join("broken");
    let (real, broken) = (real.display(), broken.display());
    let script = format!(
        "#!/bin/sh\n[ -e {broken} ] || exec {real} \"$@\"\nsed 's/^[*]nat$/*none/' | {real} \"$@\"\n"
    );
    fs::write(&restore, script).unwrap();
    fs::set_permissions(&restore, fs::Permissions::from_mode(0o755)).unwrap();
    (directory, tools)
}

#[test]
fn rules_that_load_in_part_refuse_and_are_loaded_whole_by_the_next_try() {
    if !root_or_skip("rules_that_load_in_part_refuse_and_are_loaded_whole_by_the_next_try") {
        return;
    }
    for (backend, flavour) in [(Backend::IptablesNft, "nft"), (Backend::IptablesLegacy, "legacy")] {
        let (directory, tools) = without_nat(flavour);
        block_on(async {
            let lab = two_nodes();
            let (server, client) = (lab.pod("server"), lab.pod("client"));
            start_app(&client.netns, 9090);
            start_app(&server.netns, 8080);
            start_server(&client.netns, 53, "upstream");
            let capture = probe(backend, &tools).unwrap();
            fs::write(directory.path().join("broken"), "").unwrap();
            let error = capture.install(&server.netns, &Rules::default()).unwrap_err();
            assert!(error.to_string().contains("none"), "{error}");
            let refused = Err(io::ErrorKind::ConnectionRefused);
            let case = Case { backend, v6: false };
            let outcome = async |from: &Host, to| dial(&from.netns, to).await.map(drop);
            assert_eq!(outcome(server, case.addr(client, 9090)).await, refused);
            assert_eq!(outcome(client, case.addr(server, 8080)).await, refused);
            let query = resolver(&server.netns, case.addr(client, 53), 0, false).await;
            let error = ask(&query, "1").await.unwrap_err();
            assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            fs::remove_file(directory.path().join("broken")).unwrap();
            assert!(capture.install(&server.netns, &Rules::default()).unwrap().changed);
            assert!(capture.verify(&server.netns, &Rules::default()).unwrap().is_none());
        });
    }
}

#[test]
fn a_missing_capability_is_named() {
    if !root_or_skip("a_missing_capability_is_named") {
        return;
    }
    for (capability, name) in
        [(Capability::CAP_NET_ADMIN, "CAP_NET_ADMIN"), (Capability::CAP_SYS_ADMIN, "CAP_SYS_ADMIN")]
    {
        // Capabilities are a thread's own.
        let thread = std::thread::spawn(move || {
            caps::drop(None, CapSet::Effective, capability).unwrap();
            probe(Backend::Nftables, &Tools::default())
        });
        match thread.join().unwrap() {
            Err(missing @ Missing::Capability { .. }) => assert!(missing.to_string().starts_with(name)),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn rules_past_all_limits_are_refused() {
    if !root_or_skip("rules_past_all_limits_are_refused") {
        return;
    }
    let lab = Lab::builder().node("a", &["server"]).build().unwrap();
    let capture = probe(Backend::Nftables, &Tools::default()).unwrap();
    let port = |number: usize| {
        let number = u16::try_from(2 * number + 1).unwrap();
        PortRange::new(number, number).unwrap()
    };
    let with = |ports: usize| Rules {
        include_inbound_ports: Include::Only((0..ports).map(port).collect()),
        ..Rules::default()
    };
    let netns = &lab.pod("server").netns;
    assert!(matches!(capture.install(netns, &with(2000)), Err(Error::TooManyEntries(2000))));
    capture.install(netns, &with(1000)).unwrap();
    assert!(capture.verify(netns, &with(1000)).unwrap().is_none());
}
