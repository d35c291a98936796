//! Bad files while traffic flows: what was in force stays, and the log and the admin page say what is wrong where.

use std::fs;
use std::net::SocketAddr;

use harness::netns::root_or_skip;

use crate::lab::manifests::{join, mtls, policy};
use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{MOMENT, Mesh, Options, eventually};

async fn mesh() -> Mesh {
    Mesh::start(&[("a", &["client"]), ("b", &["web", "outside/old"])]).await
}

fn web(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.pod("web").ipv4.into(), PORT)
}

/// Whether a diagnostic with this code is listed for the file, at this place.
async fn listed(mesh: &Mesh, code: &str, file: &str, place: (u64, u64)) -> bool {
    let dump = mesh.ztunnel("b").config_dump().await;
    let list = dump["diagnostics"].as_array().unwrap();
    list.iter().any(|d| {
        d["code"] == code
            && d["file"].as_str().unwrap().ends_with(file)
            && (d["line"].as_u64(), d["column"].as_u64()) == (Some(place.0), Some(place.1))
    })
}

#[tokio::test]
async fn a_bad_edit_leaves_what_was_in_force() {
    if !root_or_skip("bad edits") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let (client, old, to) = (mesh.pod("client"), mesh.pod("old"), web(&mesh));
    let good =
        policy("only", "ALLOW", "web", "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]");
    mesh.apply("policy", &good).await;
    let mut open = talk(client, to).await.unwrap();
    let pod = mesh.manifest("web").to_string();
    let second = pod.replace("name: web\n", "name: twin\n").replace("uid: pod-web", "uid: pod-twin");
    let half = &good[..good.len() / 2];
    for (code, name, text, place) in [
        ("malformed-yaml", "policy", "a: [b\nc: }\n", (2, 2)),
        ("malformed-yaml", "policy", half, (6, 1)),
        ("unknown-field", "policy", &good.replace("action:", "acton:"), (6, 3)),
        ("invalid-value", "policy", &good.replace("ALLOW", "ALOW"), (6, 11)),
        ("duplicate-key", "policy", &format!("{good}spec: {{}}\n"), (9, 1)),
        ("duplicate-object", "twice", &good, (1, 1)),
        ("address-conflict", "twin", &second[second.find("---\n").unwrap() + 4..], (1, 1)),
        ("unknown-kind", "odd", "apiVersion: v1\nkind: Prod\nmetadata: {name: x}\n", (2, 7)),
        ("not-an-object", "odd", "- 1\n- 2\n", (1, 3)),
    ] {
        mesh.apply(name, text).await;
        let list = mesh.ztunnel("b").config_dump().await["diagnostics"].to_string();
        assert!(
            listed(&mesh, code, &format!("/{name}.yaml"), place).await,
            "{code} is not listed at {place:?}: {list}"
        );
        let at = format!("/{name}.yaml:{}:{}: error[{code}]", place.0, place.1);
        mesh.ztunnel("b").says(&["error", &at]).await;
        // The policy holds as it was; so does all else.
        open.echo().await.unwrap_or_else(|e| panic!("{code}: the open connection is gone: {e}"));
        ask(client, to).await.unwrap_or_else(|e| panic!("{code}: the client is refused: {e}"));
        assert!(ask(old, to).await.is_err(), "{code}: the policy is no longer in force");
        if name == "policy" {
            mesh.apply(name, &good).await;
        } else {
            mesh.remove(name).await;
        }
        assert!(!listed(&mesh, code, &format!("/{name}.yaml"), place).await, "{code} is still listed");
    }
    // And a good edit is taken as ever.
    mesh.remove("policy").await;
    ask(old, to).await.unwrap();
}

#[tokio::test]
async fn a_file_that_is_being_written_is_not_read_half() {
    if !root_or_skip("half-written files") {
        return;
    }
    use std::io::Write;
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let (old, to) = (mesh.pod("old"), web(&mesh));
    let deny = policy("deny", "DENY", "web", "from: [{source: {namespaces: [outside]}}]");
    let strict = mtls("STRICT", None);
    let both = join([deny, strict]);
    // Each part is good YAML; what stands in the file for a while is not what is meant.
    let mut file = fs::File::create(mesh.manifests().join("slow.yaml")).unwrap();
    let until = both.find("  selector").unwrap();
    file.write_all(&both.as_bytes()[..until]).unwrap();
    tokio::time::sleep(MOMENT).await;
    ask(old, to).await.expect("a half-written policy is in force");
    file.write_all(&both.as_bytes()[until..]).unwrap();
    drop(file);
    eventually("the whole file is in force", async || ask(old, to).await.is_err()).await;
    assert_eq!(
        mesh.ztunnel("b").config_dump().await["diagnostics"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|d| d["severity"] == "error")
            .count(),
        0
    );
}

#[tokio::test]
async fn a_directory_that_vanishes_leaves_the_mesh_as_it_was() {
    if !root_or_skip("a vanishing directory") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let (client, old, to) = (mesh.pod("client"), mesh.pod("old"), web(&mesh));
    mesh.apply("mtls", &mtls("STRICT", None)).await;
    let mut open = talk(client, to).await.unwrap();
    let (directory, away) = (mesh.manifests(), mesh.dir().join("away"));
    fs::rename(&directory, &away).unwrap();
    let b = mesh.ztunnel("b");
    b.says(&["error", "directory-gone"]).await;
    eventually("it is listed", async || {
        b.config_dump().await["diagnostics"].to_string().contains("directory-gone")
    })
    .await;
    open.echo().await.unwrap();
    ask(client, to).await.unwrap();
    let _ = ask(old, to).await.unwrap_err();

    // An empty one in its place, as of a volume that is not mounted, is no order to forget everything.
    fs::create_dir(&directory).unwrap();
    tokio::time::sleep(MOMENT).await;
    open.echo().await.unwrap();
    let _ = ask(old, to).await.unwrap_err();
    fs::remove_dir(&directory).unwrap();

    // It returns with a change.
    fs::remove_file(away.join("mtls.yaml")).unwrap();
    fs::rename(&away, &directory).unwrap();
    eventually("the change is in force", async || ask(old, to).await.is_ok()).await;
    open.echo().await.unwrap();
    let dump = b.config_dump().await["diagnostics"].to_string();
    assert!(!dump.contains("directory-gone"), "{dump}");
}

#[tokio::test]
async fn a_bad_file_at_the_first_start_refuses_with_its_place() {
    if !root_or_skip("bad files at start") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"])]);
    for (text, wanted) in [
        ("a: [b\nc: }\n", ":2:2: error[malformed-yaml]"),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec:\n  portz: []\n",
            ":5:3: error[unknown-field]",
        ),
    ] {
        mesh.put("bad", text);
        mesh.spawn("a", &Options::default());
        let ztunnel = mesh.ztunnel_mut("a");
        assert_eq!(ztunnel.ended().await.code(), Some(1));
        let log = ztunnel.log();
        let at = format!("/bad.yaml{wanted}");
        assert!(log.lines().any(|l| l.contains(&at)), "{at} is not in:\n{log}");
        assert!(
            log.contains("did you mean") || text.starts_with('a') && !text.contains("portz"),
            "no remedy in:\n{log}"
        );
    }
    mesh.put("bad", "");
    fs::rename(mesh.manifests(), mesh.dir().join("away")).unwrap();
    mesh.spawn("a", &Options::default());
    let ztunnel = mesh.ztunnel_mut("a");
    assert_eq!(ztunnel.ended().await.code(), Some(1));
    assert!(ztunnel.log().contains("cannot read"), "{}", ztunnel.log());
    fs::rename(mesh.dir().join("away"), mesh.manifests()).unwrap();
    mesh.run("a", &Options::default()).await;
}
