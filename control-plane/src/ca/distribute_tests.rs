use super::*;

fn wanted(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn only_what_differs_is_written_and_nothing_before_all_was_read() {
    let mut plan = Plan::default();
    let now = Instant::now();
    assert_eq!(plan.due(&wanted(&["a"]), "R", now).0, Vec::<String>::new());
    plan.complete = true;
    plan.have.insert("a".into(), "R".into());
    plan.have.insert("b".into(), "old".into());
    plan.have.insert("elsewhere".into(), "old".into());
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
            plan.have.insert("a".into(), "theirs".into());
        }
    }
    assert!((10..=25).contains(&writes), "{writes} writes in an hour");
    let (due, again) = plan.due(&all, "R", start + Duration::from_secs(3600));
    assert!(!due.is_empty() || again.is_some(), "it is looked at again");
    // After a quiet it is put right at once.
    plan.have.insert("a".into(), "R".into());
    let later = start + Duration::from_secs(3600 + 2000);
    assert_eq!(plan.due(&all, "R", later), (vec![], None));
    plan.have.insert("a".into(), "edited".into());
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
