//! A spawner that is killed while it prepares a container that is to wait: what it leaves is taken away by the next one, wherever
//! in between that was.

use crate::stage::{
    Another, Cleanup, Models, SOON, containers, docker, options, transport, until, variable,
    worker_image,
};
use crate::warm::{DISK_MB, HOME, connect, slots, waiting};
use crate::warm_disks::{none_is_used, used};
use spawner::runtime::{Containers, Runtime as _};
use spawner::{Disk, Spawner};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// Which word between a spawner and its engine never arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    Question,
    Answer,
}

/// Stands between a spawner and its engine, and keeps one word for itself.
struct Between {
    address: String,
    lost: Arc<AtomicBool>,
}

impl Between {
    /// Keeps the first question for this path, or the answer to it.
    fn new(folder: &Path, path: &'static str, which: Lost) -> Self {
        let socket = folder.join("between");
        let listener = UnixListener::bind(&socket).unwrap();
        let lost = Arc::<AtomicBool>::default();
        let engine = variable("ARTEL_TEST_DOCKER_HOST");
        let engine = engine.trim_start_matches("unix://").to_owned();
        let is_lost = Arc::clone(&lost);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = UnixStream::connect(&engine).await.unwrap();
                tokio::spawn(pass(near, far, path, which, Arc::clone(&is_lost)));
            }
        });
        Self {
            address: format!("unix://{}", socket.display()),
            lost,
        }
    }
}

/// Passes on what both say. Nobody asks before the last answer is there.
async fn pass(near: UnixStream, far: UnixStream, path: &str, which: Lost, lost: Arc<AtomicBool>) {
    let (mut asks, mut hears) = near.into_split();
    let (mut answers, mut told) = far.into_split();
    let is_asked = Arc::<AtomicBool>::default();
    let questions = async {
        while let Some(words) = next(&mut asks).await {
            let line = words
                .split(|byte| *byte == b'\r')
                .next()
                .unwrap_or_default();
            let line = String::from_utf8_lossy(line);
            if line.starts_with("POST ") && line.contains(path) {
                if which == Lost::Question {
                    lost.store(true, Ordering::SeqCst);
                    std::future::pending::<()>().await;
                }
                is_asked.store(true, Ordering::SeqCst);
            }
            if told.write_all(&words).await.is_err() {
                break;
            }
        }
    };
    let answered = async {
        while let Some(words) = next(&mut answers).await {
            if is_asked.load(Ordering::SeqCst) {
                lost.store(true, Ordering::SeqCst);
                std::future::pending::<()>().await;
            }
            if hears.write_all(&words).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = questions => {}
        () = answered => {}
    }
}

async fn next(from: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut words = vec![0; 64 << 10];
    let count = from
        .read(&mut words)
        .await
        .ok()
        .filter(|count| *count > 0)?;
    words.truncate(count);
    Some(words)
}

/// A home in which nothing runs, and what a spawner of it has, which keeps one container ready.
struct Left {
    home: PathBuf,
    next: Arc<Containers>,
    label: String,
    // In this order: containers, then what they have mounted.
    _cleanup: Cleanup,
    folder: tempfile::TempDir,
}

impl Left {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("home");
        let (next, cleanup) = connect(&home, &worker_image(), 1).await;
        Self {
            label: next.label().to_owned(),
            home,
            next,
            _cleanup: cleanup,
            folder,
        }
    }

    fn slots(&self) -> Vec<PathBuf> {
        let pool = std::fs::read_dir(self.home.join("pool"));
        let slots = pool.into_iter().flatten();
        slots.map(|slot| slot.unwrap().path()).collect()
    }

    /// The next spawner keeps one container ready and has taken away what it found; when it ends, nothing is left.
    async fn is_taken_away(&self) {
        let (slots_before, before) = (self.slots(), containers(&self.label));
        let bus = transport(&self.home).await;
        let mut options = options(
            &self.home,
            self.next.clone(),
            bus,
            Arc::new(Models::default()),
        );
        options.disk = Disk::Loop;
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(Spawner::new(options).unwrap().run(shutdown.clone()));
        until(async || (self.next.waiting() == 1).then_some(())).await;
        let now = waiting(&self.label);
        assert_eq!(now.len(), 1, "{now:?}");
        assert_eq!(containers(&self.label), now);
        assert!(before.iter().all(|id| !now.contains(id)));
        assert_eq!(slots(&self.home), 1);
        for slot in slots_before {
            assert!(!slot.exists(), "{}", slot.display());
            assert_eq!(used(&slot), (0, 0), "{}", slot.display());
        }
        shutdown.cancel();
        let ended = tokio::time::timeout(SOON, running).await.unwrap();
        ended.unwrap().unwrap();
        assert!(containers(&self.label).is_empty());
        assert_eq!(slots(&self.home), 0);
        none_is_used(self.folder.path()).await;
    }
}

async fn killed_when(path: &'static str, which: Lost, made: usize) {
    let left = Left::new().await;
    let between = Between::new(left.folder.path(), path, which);
    let env = [
        (HOME, left.home.as_os_str()),
        ("ARTEL_TEST_DISK", OsStr::new("loop")),
        ("ARTEL_TEST_DOCKER_HOST", OsStr::new(&between.address)),
    ];
    let mut program = Another::start("warm::the_program_that_dies", env);
    until(async || between.lost.load(Ordering::SeqCst).then_some(())).await;
    program.kill();
    assert_eq!(left.slots().len(), 1);
    assert_eq!(containers(&left.label).len(), made);
    assert_eq!(
        used(&left.home.join("pool")),
        (1, 1),
        "its disk is mounted still"
    );
    left.is_taken_away().await;
}

#[tokio::test]
async fn before_the_engine_has_heard_of_the_container() {
    killed_when("/containers/create?", Lost::Question, 0).await;
}

#[tokio::test]
async fn when_the_container_is_made_and_nobody_knows() {
    killed_when("/containers/create?", Lost::Answer, 1).await;
}

#[tokio::test]
async fn when_the_container_is_made_and_not_begun() {
    killed_when("/start", Lost::Question, 1).await;
}

#[tokio::test]
async fn when_the_container_has_begun_and_nobody_knows() {
    killed_when("/start", Lost::Answer, 1).await;
}

/// Runs a program of this machine.
fn run(words: &[&str]) {
    let status = Command::new(words[0]).args(&words[1..]).status();
    assert!(status.unwrap().success(), "{words:?}");
}

#[tokio::test]
async fn before_there_is_a_disk_or_while_it_is_made() {
    let left = Left::new().await;
    // As if a spawner had been killed after each of these, each time with a folder of its own.
    let steps: [&dyn Fn(&Path); 6] = [
        &|slot| std::fs::create_dir_all(slot).unwrap(),
        &|slot| drop(std::fs::File::create(slot.join("lock")).unwrap()),
        &|slot| {
            std::fs::create_dir(slot.join("broker")).unwrap();
            drop(std::os::unix::net::UnixListener::bind(slot.join("broker/go")).unwrap());
        },
        &|slot| {
            let disk = std::fs::File::create(slot.join("disk.new")).unwrap();
            disk.set_len(DISK_MB << 20).unwrap();
        },
        &|slot| {
            let disk = slot.join("disk.img");
            std::fs::rename(slot.join("disk.new"), &disk).unwrap();
            run(&["mke2fs", "-q", "-F", "-t", "ext4", disk.to_str().unwrap()]);
        },
        &|slot| {
            let (disk, folder) = (slot.join("disk.img"), slot.join("disk"));
            std::fs::create_dir(&folder).unwrap();
            run(&[
                "mount",
                "-o",
                "loop",
                disk.to_str().unwrap(),
                folder.to_str().unwrap(),
            ]);
        },
    ];
    for most in 1..=steps.len() {
        let slot = left.home.join(format!("pool/{most:016}"));
        for step in &steps[..most] {
            step(&slot);
        }
    }
    assert_eq!(used(&left.home.join("pool")), (1, 1));
    left.is_taken_away().await;
}

#[tokio::test]
async fn what_an_engine_makes_of_a_slot_when_that_is_gone_already_is_removed() {
    let left = Left::new().await;
    let image = worker_image();
    let make = |label: &str, slot: &str| {
        let labels = [
            format!("artel.home={label}"),
            "artel.spawner=another".to_owned(),
            "artel.part=pool".to_owned(),
            format!("artel.slot={slot}"),
        ];
        let mut words = vec!["create"];
        words.extend(labels.iter().flat_map(|label| ["--label", label.as_str()]));
        words.extend([image.as_str(), "true"]);
        docker(&words).trim().to_owned()
    };
    // A neighbour prepares one; the other one came too late; the last is of another home.
    std::fs::create_dir_all(left.home.join("pool/0b")).unwrap();
    let prepared = make(&left.label, "0b");
    let late = make(&left.label, "0a");
    let strangers = format!("{}-another", left.label);
    let _cleanup = Cleanup(Some(strangers.clone()));
    let anothers = make(&strangers, "0a");
    left.next.end_strays().await.unwrap();
    let ours = containers(&left.label);
    assert!(
        !ours.contains(&late) && ours.contains(&prepared),
        "{ours:?}"
    );
    assert_eq!(containers(&strangers), [anothers]);
}
