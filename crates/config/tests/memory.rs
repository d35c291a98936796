//! What a proxy that reads files holds of a pod: its object, what it compiles to, and the snapshot.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod heap;

use std::fmt::Write;
use std::sync::Arc;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::Mesh;

fn pod(text: &mut String, number: usize) {
    let (node, app) = (number % 400, number / 100);
    write!(
        text,
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: app-{app}-{number}\n  namespace: many\n  labels:\n    app: \
         app-{app}\n    istio.io/dataplane-mode: ambient\nspec:\n  nodeName: other-{node}\n  serviceAccountName: \
         app-{app}\nstatus:\n  phase: Running\n  podIP: 10.{}.{}.{}\n",
        number >> 16,
        number >> 8 & 255,
        number & 255,
    )
    .unwrap();
}

fn service(text: &mut String, app: usize) {
    let (a, b) = (app / 250, app % 250 + 1);
    write!(
        text,
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app-{app}, namespace: many}}\nspec:\n  clusterIP: \
         10.97.{a}.{b}\n  selector: {{app: app-{app}}}\n  ports: [{{port: 80, targetPort: 8080}}]\n",
    )
    .unwrap();
}

#[test]
fn a_pod_takes_little() {
    // As full as with 100,000 are the tables.
    const PODS: usize = 25_000;
    const FILE: usize = 1000;
    let files: Vec<(Arc<str>, String)> = (0..PODS / FILE)
        .map(|file| {
            let mut text = String::new();
            (file * FILE..(file + 1) * FILE).for_each(|number| pod(&mut text, number));
            (format!("{file}.yaml").into(), text)
        })
        .collect();
    let mut services = String::new();
    (0..PODS / 100).for_each(|app| service(&mut services, app));

    let before = heap::watch();
    let mut repository = Repository::new(Options::default());
    for (name, text) in &files {
        repository.stage(name, Content::Bytes(text.as_bytes()));
    }
    repository.stage(&"services.yaml".into(), Content::Bytes(services.as_bytes()));
    let outcome = repository.commit();
    assert!(outcome.diagnostics.is_empty(), "{:?}", outcome.diagnostics.first());
    let mesh = Mesh::default().apply(outcome.changes);
    assert_eq!(mesh.workload_count(), PODS);
    let of_one = |bytes: usize| (bytes - before) / PODS;
    let (held, most) = (of_one(heap::live()), of_one(heap::most()));
    assert!(held < 395 && most < 436, "{held} bytes, {most} at most while they were read");
}
