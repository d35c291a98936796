//! A real directory on a real file system, changed in the ways that people and programs change one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use config::diagnostic::Code;
use config::directory::{Directory, OpenError, Options};
use config::repository::Outcome;
use model::{Change, Connection, Mesh};
use tempfile::TempDir;
use tokio::time::timeout;

fn pod(name: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{}}\nstatus: {{podIP: {address}}}\n"
    )
}

fn write(path: impl AsRef<Path>, content: &str) {
    fs::write(path, content).unwrap();
}

/// The names and first addresses of the workloads.
fn pods(mesh: &Mesh) -> Vec<String> {
    let mut list: Vec<String> =
        mesh.workloads().map(|w| format!("{} {}", w.name(), w.addresses[0])).collect();
    list.sort();
    list
}

struct Watched {
    directory: Directory,
    mesh: Mesh,
}

impl Watched {
    fn open(path: &Path) -> Self {
        let (directory, outcome) = Directory::open(path, Options::default()).unwrap();
        Self { directory, mesh: Mesh::default().apply(outcome.changes) }
    }

    async fn next(&mut self) -> Outcome {
        let outcome = timeout(Duration::from_secs(10), self.directory.next()).await.expect("a change");
        self.mesh = self.mesh.apply(outcome.changes.iter().cloned());
        outcome
    }

    /// Outcomes until the pods are as expected; all of them must come within the time of [`Watched::next`].
    async fn until(&mut self, expected: &[&str]) {
        for _ in 0..10 {
            if pods(&self.mesh) == expected {
                return;
            }
            self.next().await;
        }
        assert_eq!(pods(&self.mesh), expected);
    }

    async fn stays_quiet(&mut self, time: Duration) {
        if let Ok(outcome) = timeout(time, self.directory.next()).await {
            panic!("nothing should have changed: {outcome:?}");
        }
    }
}

fn directory() -> TempDir {
    let dir = TempDir::new().unwrap();
    write(dir.path().join("a.yaml"), &pod("a", "10.0.0.1"));
    dir
}

#[test]
fn everything_below_is_read_except_what_is_hidden() {
    let (dir, elsewhere) = (directory(), TempDir::new().unwrap());
    let path = dir.path();
    fs::create_dir_all(path.join("sub/deeper")).unwrap();
    fs::create_dir(path.join(".git")).unwrap();
    write(path.join("sub/deeper/b.YML"), &pod("b", "10.0.0.2"));
    write(
        path.join("sub/c.json"),
        r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c"},"status":{"podIP":"10.0.0.3"}}"#,
    );
    write(path.join(".git/d.yaml"), "{");
    write(path.join(".e.yaml"), "{");
    write(path.join("README.md"), "{");
    write(path.join("f.yaml~"), "{");
    write(elsewhere.path().join("g.yaml"), &pod("g", "10.0.0.7"));
    symlink(elsewhere.path().join("g.yaml"), path.join("g.yaml")).unwrap();
    symlink(elsewhere.path().join("nothing"), path.join("h.txt")).unwrap();
    symlink(path, path.join("sub/loop")).unwrap();
    let (repository, outcome) = Directory::load(path, Options::default()).unwrap();
    let mesh = Mesh::default().apply(outcome.changes);
    assert_eq!(pods(&mesh), ["a 10.0.0.1", "b 10.0.0.2", "c 10.0.0.3", "g 10.0.0.7"]);
    assert_eq!(repository.object_count(), 4);
}

#[test]
fn a_bad_file_at_first_start_refuses_to_start_with_all_that_is_wrong() {
    let dir = directory();
    write(dir.path().join("b.yaml"), "a: [");
    write(dir.path().join("c.yaml"), &pod("c", "10.0.0.256"));
    let Err(OpenError::Bad(_, diagnostics)) = Directory::open(dir.path(), Options::default()) else {
        panic!("it must be refused");
    };
    let codes: Vec<Code> = diagnostics.iter().map(|d| d.code).collect();
    assert_eq!(codes, [Code::MalformedYaml, Code::InvalidValue]);
    let missing = dir.path().join("nowhere");
    assert!(matches!(Directory::open(missing, Options::default()), Err(OpenError::Unreadable(..))));
}

#[test]
fn no_number_of_lesser_findings_hides_an_error() {
    let dir = directory();
    let ignored = |n| format!("---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d{n}}}\n");
    let many: String = (0..1000).map(ignored).collect();
    write(dir.path().join("b.yaml"), &(many + &pod("b", "nowhere")));
    let Err(OpenError::Bad(_, diagnostics)) = Directory::open(dir.path(), Options::default()) else {
        panic!("it must be refused");
    };
    let count = |code| diagnostics.iter().filter(|d| d.code == code).count();
    assert_eq!(
        (count(Code::IgnoredKind), count(Code::InvalidValue), count(Code::TooManyDiagnostics)),
        (200, 1, 1)
    );
}

#[tokio::test]
async fn a_directory_that_is_never_quiet_is_read_all_the_same() {
    let dir = directory();
    let options = Options { longest: Duration::from_millis(300), ..Options::default() };
    let (mut directory, _) = Directory::open(dir.path(), options).unwrap();
    let path = dir.path().to_owned();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let writer = std::thread::spawn(move || {
        for n in 0.. {
            write(
                path.join(format!("{}.yaml", n % 3)),
                &pod(&format!("p{}", n % 3), &format!("10.0.1.{}", n % 200)),
            );
            std::thread::sleep(Duration::from_millis(1));
            if stopped.load(std::sync::atomic::Ordering::Relaxed) {
                return;
            }
        }
    });
    let outcome = timeout(Duration::from_secs(5), directory.next()).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
    assert!(!outcome.expect("an outcome").changes.is_empty());
}

#[tokio::test]
async fn files_that_change_together_are_one_outcome() {
    let dir = directory();
    let mut watched = Watched::open(dir.path());
    write(dir.path().join("a.yaml"), &pod("a", "10.0.0.9"));
    write(dir.path().join("b.yaml"), &pod("b", "10.0.0.2"));
    fs::create_dir(dir.path().join("sub")).unwrap();
    write(dir.path().join("sub/c.yaml"), &pod("c", "10.0.0.3"));
    let outcome = watched.next().await;
    assert_eq!(outcome.changes.len(), 3);
    assert_eq!(pods(&watched.mesh), ["a 10.0.0.9", "b 10.0.0.2", "c 10.0.0.3"]);
    // The new directory is watched as well.
    write(dir.path().join("sub/c.yaml"), &pod("c", "10.0.0.4"));
    watched.next().await;
    fs::remove_dir_all(dir.path().join("sub")).unwrap();
    watched.until(&["a 10.0.0.9", "b 10.0.0.2"]).await;
    watched.stays_quiet(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn an_editor_that_writes_beside_and_renames_makes_one_change() {
    let dir = directory();
    let mut watched = Watched::open(dir.path());
    write(dir.path().join(".a.yaml.swp"), "{");
    write(dir.path().join("a.yaml~"), &pod("a", "10.0.0.1"));
    let temporary = dir.path().join(".a.yaml.tmp");
    write(&temporary, &pod("a", "10.0.0.5"));
    fs::rename(&temporary, dir.path().join("a.yaml")).unwrap();
    let outcome = watched.next().await;
    assert!(matches!(&outcome.changes[..], [Change::SetWorkload(_)]), "{outcome:?}");
    assert_eq!(pods(&watched.mesh), ["a 10.0.0.5"]);
}

#[tokio::test]
async fn a_file_is_not_read_while_it_is_being_written() {
    let dir = directory();
    let mut watched = Watched::open(dir.path());
    let mut file = File::create(dir.path().join("a.yaml")).unwrap();
    file.write_all(pod("a", "10.0.0.2").as_bytes()).unwrap();
    watched.stays_quiet(Duration::from_millis(300)).await;
    file.write_all(pod("b", "10.0.0.3").as_bytes()).unwrap();
    drop(file);
    watched.next().await;
    assert_eq!(pods(&watched.mesh), ["a 10.0.0.2", "b 10.0.0.3"]);
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_is_said_once() {
    let dir = directory();
    let mut watched = Watched::open(dir.path());
    write(dir.path().join("a.yaml"), "a: [");
    let outcome = watched.next().await;
    assert!(outcome.changes.is_empty());
    assert_eq!(outcome.diagnostics[0].code, Code::MalformedYaml);
    write(dir.path().join("b.yaml"), &pod("b", "10.0.0.2"));
    let outcome = watched.next().await;
    assert_eq!((outcome.changes.len(), outcome.diagnostics.len()), (1, 0));
    assert_eq!(pods(&watched.mesh), ["a 10.0.0.1", "b 10.0.0.2"]);
    write(dir.path().join("a.yaml"), &pod("a", "10.0.0.1"));
    let outcome = watched.next().await;
    assert!(outcome.changes.is_empty() && watched.directory.diagnostics().is_empty());
}

#[tokio::test]
async fn a_new_policy_with_errors_closes_what_it_is_for_while_all_runs() {
    let dir = directory();
    write(dir.path().join("b.yaml"), &pod("b", "10.0.0.2"));
    let mut watched = Watched::open(dir.path());
    let lets_in = |mesh: &Mesh, name: &str| {
        let workload = mesh.workloads().find(|w| w.name() == name).expect("the pod");
        let connection =
            Connection::new(None, "10.0.0.9".parse().unwrap(), (workload.addresses[0], 80).into());
        mesh.authorize(workload, &connection).outcome.is_ok()
    };
    assert!(lets_in(&watched.mesh, "a") && lets_in(&watched.mesh, "b"));
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  selector: \
                  {matchLabels: {app: a}}\n  rules: [{from: [{source: {namespaces: [x]}}]}]\n";
    write(dir.path().join("a.yaml"), &pod("a", "10.0.0.1").replace("name: a", "name: a, labels: {app: a}"));
    watched.next().await;
    write(dir.path().join("p.yaml"), &policy.replace("source:", "sauce:"));
    let outcome = watched.next().await;
    assert!(outcome.diagnostics.iter().any(|d| d.code == Code::FailsClosed), "{:?}", outcome.diagnostics);
    assert!(!lets_in(&watched.mesh, "a"), "nobody knows whom it was to let in");
    assert!(lets_in(&watched.mesh, "b"), "it is not for this one");
    fs::remove_file(dir.path().join("p.yaml")).unwrap();
    watched.next().await;
    assert!(lets_in(&watched.mesh, "a"));
}

#[tokio::test]
async fn a_directory_that_vanishes_keeps_its_state_until_it_returns() {
    let outer = TempDir::new().unwrap();
    let path = outer.path().join("config");
    fs::create_dir(&path).unwrap();
    write(path.join("a.yaml"), &pod("a", "10.0.0.1"));
    write(path.join("b.yaml"), &pod("b", "10.0.0.2"));
    let mut watched = Watched::open(&path);
    fs::rename(&path, outer.path().join("away")).unwrap();
    let outcome = watched.next().await;
    assert!(outcome.changes.is_empty());
    assert_eq!(outcome.diagnostics[0].code, Code::DirectoryGone);
    assert_eq!(pods(&watched.mesh), ["a 10.0.0.1", "b 10.0.0.2"]);
    // As the mount point of a volume that went away: there, and empty.
    fs::create_dir(&path).unwrap();
    watched.stays_quiet(Duration::from_millis(300)).await;
    assert_eq!(watched.directory.diagnostics()[0].code, Code::DirectoryGone);
    fs::remove_dir(&path).unwrap();
    write(outer.path().join("away/b.yaml"), &pod("b", "10.0.0.3"));
    fs::rename(outer.path().join("away"), &path).unwrap();
    watched.until(&["a 10.0.0.1", "b 10.0.0.3"]).await;
    assert!(watched.directory.diagnostics().is_empty(), "{:?}", watched.directory.diagnostics());
    // And it is watched again.
    fs::remove_file(path.join("a.yaml")).unwrap();
    watched.until(&["b 10.0.0.3"]).await;
}

#[tokio::test]
async fn a_mounted_config_map_changes_by_a_link() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    for (version, address) in [("..1", "10.0.0.1"), ("..2", "10.0.0.2")] {
        fs::create_dir(path.join(version)).unwrap();
        write(path.join(version).join("a.yaml"), &pod("a", address));
    }
    symlink("..1", path.join("..data")).unwrap();
    symlink("..data/a.yaml", path.join("a.yaml")).unwrap();
    let mut watched = Watched::open(path);
    assert_eq!(pods(&watched.mesh), ["a 10.0.0.1"]);
    symlink("..2", path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    fs::remove_dir_all(path.join("..1")).unwrap();
    watched.until(&["a 10.0.0.2"]).await;
}

#[tokio::test]
async fn the_file_that_a_link_leads_to_is_watched() {
    let (dir, elsewhere) = (directory(), TempDir::new().unwrap());
    write(elsewhere.path().join("b.yaml"), &pod("b", "10.0.0.2"));
    symlink(elsewhere.path().join("b.yaml"), dir.path().join("b.yaml")).unwrap();
    let mut watched = Watched::open(dir.path());
    write(elsewhere.path().join("b.yaml"), &pod("b", "10.0.0.3"));
    watched.until(&["a 10.0.0.1", "b 10.0.0.3"]).await;
}

#[tokio::test]
async fn what_is_too_much_is_not_taken() {
    let dir = directory();
    let options = Options { most_files: 3, most_bytes: 1000, ..Options::default() };
    let (mut directory, _) = Directory::open(dir.path(), options).unwrap();
    write(dir.path().join("a.yaml"), &pod("a", "10.0.0.9").repeat(100));
    let outcome = timeout(Duration::from_secs(10), directory.next()).await.unwrap();
    assert!(outcome.changes.is_empty());
    assert_eq!(outcome.diagnostics[0].code, Code::FileTooLarge);
    write(dir.path().join("a.yaml"), &pod("a", "10.0.0.1"));
    timeout(Duration::from_secs(10), directory.next()).await.unwrap();
    for i in 2..6 {
        write(dir.path().join(format!("{i}.yaml")), &pod(&format!("p{i}"), &format!("10.0.0.{i}")));
    }
    let outcome = timeout(Duration::from_secs(10), directory.next()).await.unwrap();
    assert!(outcome.changes.is_empty());
    assert_eq!(outcome.diagnostics[0].code, Code::TooManyFiles);
}

#[test]
fn a_link_that_leads_nowhere_is_not_taken_for_a_file_that_is_not_there() {
    for name in ["deny.yaml", "policies"] {
        let dir = directory();
        symlink(dir.path().join("nothing"), dir.path().join(name)).unwrap();
        let Err(OpenError::Bad(_, diagnostics)) = Directory::open(dir.path(), Options::default()) else {
            panic!("it must be refused: {name}");
        };
        assert_eq!(diagnostics[0].code, Code::FileUnreadable);
    }
}

#[tokio::test]
async fn what_a_link_led_to_stays_in_force_when_it_goes_away() {
    let (dir, volume) = (directory(), TempDir::new().unwrap());
    let mount = volume.path().join("mount");
    fs::create_dir(&mount).unwrap();
    write(mount.join("b.yaml"), &pod("b", "10.0.0.2"));
    symlink(mount.join("b.yaml"), dir.path().join("b.yaml")).unwrap();
    // A directory may be called anything.
    for (name, address) in [("sub", "10.0.0.3"), ("sub.d", "10.0.0.4")] {
        fs::create_dir(mount.join(name)).unwrap();
        write(mount.join(name).join("c.yaml"), &pod(&name.replace('.', "-"), address));
        symlink(mount.join(name), dir.path().join(name)).unwrap();
    }
    let mut watched = Watched::open(dir.path());
    let all = ["a 10.0.0.1", "b 10.0.0.2", "sub 10.0.0.3", "sub-d 10.0.0.4"];
    assert_eq!(pods(&watched.mesh), all);
    let away = volume.path().join("away");
    for _ in 0..2 {
        fs::rename(&mount, &away).unwrap();
        // Something that is told of where we are.
        write(dir.path().join("a.yaml"), &pod("a", "10.0.0.9"));
        watched.until(&["a 10.0.0.9", "b 10.0.0.2", "sub 10.0.0.3", "sub-d 10.0.0.4"]).await;
        let said: Vec<Code> = watched.directory.diagnostics().iter().map(|d| d.code).collect();
        assert_eq!(said.iter().filter(|c| **c == Code::FileUnreadable).count(), 3, "{said:?}");
        fs::rename(&away, &mount).unwrap();
        write(dir.path().join("a.yaml"), &pod("a", "10.0.0.1"));
        watched.until(&all).await;
        assert_eq!(watched.directory.diagnostics(), []);
    }
    // Who deletes the links means it.
    for name in ["b.yaml", "sub", "sub.d"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    watched.until(&["a 10.0.0.1"]).await;
}

#[tokio::test]
async fn a_subdirectory_that_is_replaced_by_an_empty_one_keeps_its_state() {
    let (dir, aside) = (directory(), TempDir::new().unwrap());
    let sub = dir.path().join("sub");
    fs::create_dir(&sub).unwrap();
    write(sub.join("b.yaml"), &pod("b", "10.0.0.2"));
    let mut watched = Watched::open(dir.path());
    // As the mount point of a volume that goes away: there, and empty.
    fs::rename(&sub, aside.path().join("sub")).unwrap();
    fs::create_dir(&sub).unwrap();
    for address in ["10.0.0.8", "10.0.0.9"] {
        write(dir.path().join("a.yaml"), &pod("a", address));
        watched.until(&[&format!("a {address}"), "b 10.0.0.2"]).await;
        assert_eq!(watched.directory.diagnostics()[0].code, Code::FileUnreadable);
    }
    fs::remove_dir(&sub).unwrap();
    fs::rename(aside.path().join("sub"), &sub).unwrap();
    write(sub.join("b.yaml"), &pod("b", "10.0.0.3"));
    watched.until(&["a 10.0.0.9", "b 10.0.0.3"]).await;
    assert_eq!(watched.directory.diagnostics(), []);
    // One that is emptied where it stands is empty.
    fs::remove_file(sub.join("b.yaml")).unwrap();
    watched.until(&["a 10.0.0.9"]).await;
}

#[tokio::test]
async fn a_file_that_is_emptied_to_be_written_keeps_what_it_held() {
    let dir = directory();
    let mut watched = Watched::open(dir.path());
    // As `kubectl get -o yaml > a.yaml`, which takes its time.
    let mut file = File::create(dir.path().join("a.yaml")).unwrap();
    let outcome = watched.next().await;
    assert!(outcome.changes.is_empty(), "{outcome:?}");
    assert_eq!(outcome.diagnostics[0].code, Code::FileUnreadable);
    file.write_all(pod("a", "10.0.0.2").as_bytes()).unwrap();
    drop(file);
    watched.until(&["a 10.0.0.2"]).await;
    assert_eq!(watched.directory.diagnostics(), []);
    // Empty and closed is empty.
    drop(File::create(dir.path().join("a.yaml")).unwrap());
    watched.until(&[]).await;
}
