use super::*;

fn wanted(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn held(roots: &str) -> Held {
    Held { roots: roots.to_owned(), owner: None }
}

#[tokio::test(start_paused = true)]
async fn only_what_differs_is_written_and_nothing_before_all_was_read() {
    let mut plan = Plan::default();
    let now = Instant::now();
    assert_eq!(plan.due(&wanted(&["a"]), "R", now).0, Vec::<String>::new());
    plan.complete = true;
    plan.have.insert("a".into(), held("R"));
    plan.have.insert("b".into(), held("old"));
    plan.have.insert("elsewhere".into(), held("old"));
    assert_eq!(plan.due(&wanted(&["a", "b", "c"]), "R", now), (vec!["b".to_owned(), "c".to_owned()], None));
    plan.written("b".into(), Some("R"), now);
    plan.written("c".into(), Some("R"), now);
    assert_eq!(plan.due(&wanted(&["a", "b", "c"]), "R", now), (vec![], None));
    assert_eq!(plan.due(&wanted(&["a"]), "R2", now).0, ["a"], "the roots changed");
}

#[tokio::test(start_paused = true)]
async fn somebody_who_writes_again_and_again_is_not_fought() {
    let mut plan = Plan { complete: true, ..Plan::default() };
    let (start, all) = (Instant::now(), wanted(&["a"]));
    let mut writes = 0;
    for second in 0..3600 {
        let now = start + Duration::from_secs(second);
        if !plan.due(&all, "R", now).0.is_empty() {
            writes += 1;
            plan.written("a".into(), Some("R"), now);
            // Somebody overwrites it at once.
            plan.have.insert("a".into(), held("theirs"));
        }
    }
    assert!((10..=25).contains(&writes), "{writes} writes in an hour");
    let (due, again) = plan.due(&all, "R", start + Duration::from_secs(3600));
    assert!(!due.is_empty() || again.is_some(), "it is looked at again");
    // After a quiet it is put right at once.
    plan.have.insert("a".into(), held("R"));
    let later = start + Duration::from_secs(3600 + 2000);
    assert_eq!(plan.due(&all, "R", later), (vec![], None));
    plan.have.insert("a".into(), held("edited"));
    assert_eq!(plan.due(&all, "R", later).0, ["a"]);
    plan.written("a".into(), Some("R"), later);
    assert_eq!(plan.paused["a"].1, MIN_PAUSE);
}

#[tokio::test(start_paused = true)]
async fn a_failed_write_comes_again_after_a_pause() {
    let mut plan = Plan { complete: true, ..Plan::default() };
    let now = Instant::now();
    plan.written("a".into(), None, now);
    assert_eq!(plan.due(&wanted(&["a"]), "R", now), (vec![], Some(now + MIN_PAUSE)));
    assert_eq!(plan.due(&wanted(&["a"]), "R", now + MIN_PAUSE).0, ["a"]);
}

fn map(writers: &[(&str, &str)]) -> ConfigMap {
    let entry = |(manager, field): &(&str, &str)| {
        json!({"manager": manager, "operation": "Update", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:data": {".": {}, *field: {}}}})
    };
    let fields: Vec<_> = writers.iter().map(entry).collect();
    serde_json::from_value(json!({"metadata": {"name": CONFIG_MAP, "managedFields": fields}, "data": {"root-cert.pem": "theirs"}}))
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_another_keeps_is_left_alone_and_named() {
    let (root, other) = ("f:root-cert.pem", "f:other");
    let owner = |writers: &[(&str, &str)]| Held::of(&map(writers)).owner;
    assert_eq!(owner(&[("pilot-discovery", root)]).as_deref(), Some("pilot-discovery"));
    assert_eq!(owner(&[("culvertd", other), ("pilot-discovery", root)]).as_deref(), Some("pilot-discovery"));
    // We wrote the same; somebody edited it; somebody wrote something else there; nobody says.
    assert_eq!(owner(&[("pilot-discovery", root), (MANAGER, root)]), None);
    assert_eq!(owner(&[("kubectl-edit", root)]), None);
    assert_eq!(owner(&[("pilot-discovery", other)]), None);
    assert_eq!(owner(&[]), None);

    let mut plan = Plan { complete: true, ..Plan::default() };
    plan.have.insert("a".into(), Held::of(&map(&[("pilot-discovery", root)])));
    plan.have.insert("b".into(), held("edited"));
    let all = wanted(&["a", "b"]);
    assert_eq!(plan.due(&all, "R", Instant::now()), (vec!["b".to_owned()], None));
    let others = plan.of_others(&all);
    assert_eq!(others, BTreeMap::from([("pilot-discovery".to_owned(), vec!["a".to_owned()])]));
    // The other is gone, and somebody deletes what it left.
    plan.have.remove("a");
    assert_eq!(plan.due(&wanted(&["a"]), "R", Instant::now()).0, ["a"]);
}
