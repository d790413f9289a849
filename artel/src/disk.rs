//! Room on the disk of the data folder: when there is none, somebody has to be told, in one sentence, and nothing else helps.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Less than this is not enough for a clone, a release and a database that grows, in bytes.
const LEAST: u64 = 64 * 1024 * 1024;
/// With less than this it is tried whether anything can be written at all: what is free for us is not what is free for
/// everybody.
const SUSPICIOUS: u64 = 1024 * 1024;
/// What is written to try it, in bytes; about what a step with its log needs.
const TRIAL: usize = 256 * 1024;
/// How often the disk is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often in a row it has to be full until a command gives up.
const PATIENCE: u32 = 5;

fn free(home: &Path) -> std::io::Result<u64> {
    let found = rustix::fs::statvfs(home)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether there is room in the data folder for work to come.
pub fn enough(home: &Path) -> anyhow::Result<()> {
    let free = free(home)?;
    anyhow::ensure!(
        free >= LEAST,
        "only {} MiB are free in {}: make room",
        free / 1024 / 1024,
        home.display()
    );
    Ok(())
}

/// Whether nothing more can be written.
fn is_full(home: &Path) -> bool {
    if free(home).is_ok_and(|free| free >= SUSPICIOUS) {
        return false;
    }
    let trial = home.join("locks/room");
    let tried = std::fs::File::create(&trial).and_then(|mut file| file.write_all(&vec![0; TRIAL]));
    let _ = std::fs::remove_file(&trial);
    tried.is_err_and(|error| {
        matches!(
            error.kind(),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded
        )
    })
}

/// Watches the disk until the end. When it is full and stays so, a command gives up, which loses nothing; a program that
/// lasts says so and waits for room.
pub async fn watch(
    home: std::path::PathBuf,
    lasting: Arc<AtomicBool>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut full = 0_u32;
    while tokio::time::timeout(LOOK, shutdown.cancelled())
        .await
        .is_err()
    {
        let folder = home.clone();
        if !tokio::task::spawn_blocking(move || is_full(&folder)).await? {
            full = 0;
            continue;
        }
        full = full.saturating_add(1);
        let lasting = lasting.load(Ordering::Relaxed);
        if lasting && full == PATIENCE {
            tracing::error!(
                "the disk of {} is full: make room; nothing is lost, and the work goes on by itself then",
                home.display()
            );
        }
        anyhow::ensure!(
            lasting || full < PATIENCE,
            "the disk of {} is full: make room; nothing is lost, and the work goes on with the next command or with `artel up`",
            home.display()
        );
    }
    Ok(())
}
