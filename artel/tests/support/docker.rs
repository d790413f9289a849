//! The Docker engine of the tests (`scripts/with-docker` starts one): an image for workers, and whose containers are there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set; run the tests through scripts/test, which starts what they need")
    })
}

/// Where the engine is.
pub fn host() -> String {
    variable("ARTEL_TEST_DOCKER_HOST")
}

/// Docker's own client, and what it said.
pub fn docker(args: &[&str]) -> String {
    let output = Command::new("docker")
        .env("DOCKER_HOST", host())
        .args(args)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The tests' image: a shell and some programs.
pub fn small_image() -> String {
    variable("ARTEL_TEST_IMAGE")
}

/// The tests' image with the program where workers' images have it; made once for every build of the program.
pub fn worker_image() -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_artel"));
    let built = std::fs::metadata(program).unwrap().modified().unwrap();
    let built = built.duration_since(std::time::UNIX_EPOCH).unwrap();
    let name = format!("artel-test-whole-program:{}", built.as_nanos());
    let alone = std::fs::File::create(std::env::temp_dir().join("artel-test-image.lock")).unwrap();
    alone.lock().unwrap();
    if !docker(&["image", "ls", "-q", &name]).trim().is_empty() {
        return name;
    }
    let layer = tempfile::tempdir().unwrap();
    let inside = layer.path().join("usr/local/bin/artel-inside");
    std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
    // What a debugger wants is most of it.
    let stripped = Command::new("strip")
        .arg("-o")
        .args([&inside, program])
        .status();
    assert!(stripped.unwrap().success(), "strip of binutils works");
    let made = docker(&["create", &variable("ARTEL_TEST_IMAGE"), "true"]);
    let container = made.trim();
    let from = format!("{}/usr", layer.path().display());
    docker(&["cp", &from, &format!("{container}:/")]);
    docker(&["commit", container, &name]);
    docker(&["rm", container]);
    assert!(!docker(&["image", "ls", "-q", &name]).trim().is_empty());
    name
}

/// The containers that see something of this folder, by id, each with the name of the spawner that it carries.
pub fn containers(folder: &Path) -> BTreeMap<String, String> {
    let all = docker(&["ps", "-aq", "--no-trunc", "--filter", "label=artel.spawner"]);
    let mut args = vec![
        "inspect",
        "-f",
        "{{.Id}} {{index .Config.Labels \"artel.spawner\"}}{{range .Mounts}} {{.Source}}{{end}}",
    ];
    args.extend(all.split_whitespace());
    let folder = folder.display().to_string();
    let about = docker(&args);
    let ours = about.lines().filter(|line| line.contains(&folder));
    let named = ours.filter_map(|line| {
        let mut words = line.split(' ');
        words.next().zip(words.next())
    });
    named
        .map(|(id, spawner)| (id.to_owned(), spawner.to_owned()))
        .collect()
}

/// Counts the containers that work on a data folder. When it is dropped, those that are left are removed.
pub struct Watch {
    folder: PathBuf,
    seen: Arc<Mutex<BTreeMap<String, String>>>,
    over: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(folder: &Path) -> Self {
        let (folder, seen) = (folder.to_owned(), Arc::<Mutex<BTreeMap<_, _>>>::default());
        let over = Arc::new(AtomicBool::new(false));
        let watcher = std::thread::spawn({
            let (folder, seen, over) = (folder.clone(), Arc::clone(&seen), Arc::clone(&over));
            // It has a thread of its own.
            #[allow(clippy::disallowed_methods)]
            move || {
                while !over.load(Ordering::Relaxed) {
                    seen.lock().unwrap().extend(containers(&folder));
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        });
        Self {
            folder,
            seen,
            over,
            watcher: Some(watcher),
        }
    }

    /// Those that there have been, all of which are gone, by id, each with the name of its spawner.
    pub fn end(self) -> BTreeMap<String, String> {
        let left = containers(&self.folder);
        assert!(left.is_empty(), "these are left over: {left:?}");
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        for id in containers(&self.folder).keys() {
            docker(&["rm", "-f", id]);
        }
    }
}
