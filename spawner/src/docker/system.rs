//! What a container writes beside the folders that it was given: into its own system, where that is writable, and into what its
//! image and its runtime give it beside that (volumes, the data of a Docker inside).
//!
//! Where the engine's storage has quotas it is asked for one (`spec.rs`), which bounds the system as it is written. Whether
//! it has or not, what is there is measured: seldom, because every file is looked at.

use super::unbegun::{Mounted, mounted};
use bollard::Docker;
use bollard::models::{ContainerInspectResponse, MountPoint};
use bollard::query_parameters::InspectContainerOptionsBuilder;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The pause between two looks, in times of what the last one took, and its bounds.
const PAUSE: u32 = 20;
const LEAST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_mins(1);
/// File systems of disks. Everything else is made by the kernel, or is memory, which is bounded by itself.
const DISKS: [&str; 7] = ["ext4", "ext3", "xfs", "btrfs", "zfs", "f2fs", "bcachefs"];

/// Looks again and again whether a container has written more than `most_mb` there, and says so in `full`. Returns then, or when
/// there is nothing that it could write into.
pub(super) async fn weigh(docker: Docker, id: String, most_mb: u64, full: Arc<AtomicBool>) {
    loop {
        let began = Instant::now();
        match is_too_much(&docker, &id, most_mb).await {
            Some(true) => return full.store(true, Ordering::Relaxed),
            Some(false) => {}
            None => return,
        }
        tokio::time::sleep((began.elapsed() * PAUSE).clamp(LEAST, MOST)).await;
    }
}

/// Whether it has; none when there is nothing that it could write into. What cannot be looked at now is looked at again.
async fn is_too_much(docker: &Docker, id: &str, most_mb: u64) -> Option<bool> {
    // Without sizes first, which take their time and are of no use for most.
    let Some(about) = inspect(docker, id, false).await else {
        return Some(false);
    };
    if !can_write(&about) {
        return None;
    }
    let Some(about) = inspect(docker, id, true).await else {
        return Some(false);
    };
    let system = u64::try_from(about.size_rw.unwrap_or_default()).unwrap_or_default();
    let most = most_mb.saturating_mul(1 << 20);
    let Some(left) = most.checked_sub(system) else {
        return Some(true);
    };
    let beside = tokio::task::spawn_blocking(move || sandbox::exceeds(&beside(&about), left));
    Some(beside.await.unwrap_or(false))
}

async fn inspect(docker: &Docker, id: &str, sizes: bool) -> Option<ContainerInspectResponse> {
    let options = InspectContainerOptionsBuilder::default()
        .size(sizes)
        .build();
    let about = docker.inspect_container(id, Some(options)).await;
    about
        .inspect_err(|error| {
            tracing::debug!(%error, container = id, "what a container writes is not known now");
        })
        .ok()
}

/// Whether it could write anywhere but into the folders that it was given: its system, or a volume, which an image may declare.
fn can_write(about: &ContainerInspectResponse) -> bool {
    let host = about.host_config.as_ref();
    let is_open = host.and_then(|config| config.readonly_rootfs) != Some(true);
    let is_volume =
        |mount: &MountPoint| mount.rw == Some(true) && mount.typ.as_deref() == Some("volume");
    is_open || about.mounts.iter().flatten().any(is_volume)
}

/// Where what a container has mounted writable is on this machine, but what we have given it. Nothing where its processes cannot
/// be seen.
fn beside(about: &ContainerInspectResponse) -> Vec<PathBuf> {
    let state = about.state.as_ref();
    let pid = state.and_then(|state| state.pid).filter(|pid| *pid > 0);
    let table = |whose: &str| std::fs::read(format!("/proc/{whose}/mountinfo"));
    let (Some(Ok(theirs)), Ok(ours)) = (pid.map(|pid| table(&pid.to_string())), table("self"))
    else {
        return Vec::new();
    };
    let given = about.host_config.as_ref();
    let given: Vec<&Path> = given
        .and_then(|config| config.mounts.as_ref())
        .into_iter()
        .flatten()
        .filter_map(|mount| mount.target.as_deref().map(Path::new))
        .collect();
    outside(&theirs, &ours, &given)
}

/// Where the mounts of one table are by another one. A container could make links, but no lines of the kernel's.
fn outside(theirs: &[u8], ours: &[u8], given: &[&Path]) -> Vec<PathBuf> {
    let ours: Vec<Mounted> = mounted(ours).collect();
    // What was given may be mounted in other places as well, and something else over it later.
    let first = |at: &&Path| mounted(theirs).find(|mount| mount.at == **at);
    let given: Vec<Mounted> = given.iter().filter_map(first).collect();
    let is_given = |mount: &Mounted| given.iter().any(|one| mount.is_of(one));
    let mut found: Vec<PathBuf> = mounted(theirs)
        .filter(|mount| mount.writable && DISKS.contains(&mount.kind.as_str()) && !is_given(mount))
        .filter_map(|mount| {
            let host = ours.iter().find(|host| mount.is_of(host))?;
            Some(host.at.join(mount.root.strip_prefix(&host.root).ok()?))
        })
        .collect();
    found.sort();
    found.dedup();
    // One in another one is counted with that.
    let all = found.clone();
    found.retain(|path| {
        !all.iter()
            .any(|other| other != path && path.starts_with(other))
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 8:2 / /data rw - xfs /dev/sdb1 rw
";

    #[test]
    fn what_a_container_can_write_into_on_disks_is_found_and_what_it_was_given_is_not() {
        let theirs = "90 80 0:70 / / rw - overlay overlay rw,upperdir=/x
91 90 0:71 / /tmp rw - tmpfs tmpfs rw
92 90 8:1 /home/w /workspace rw,nosuid - ext4 /dev/sda1 rw
93 90 8:2 /volumes/a/_data /var/lib/docker rw - xfs /dev/sdb1 rw
94 90 8:1 /containers/c/hosts /etc/hosts rw - ext4 /dev/sda1 rw
95 90 8:1 /shown /shown ro - ext4 /dev/sda1 rw
96 90 8:1 /home/w/deep /elsewhere rw - ext4 /dev/sda1 rw
97 90 8:2 /volumes/a/_data/in /var/lib/docker/in rw - xfs /dev/sdb1 rw
98 90 8:9 / /unknown rw - ext4 /dev/sdz rw
99 92 8:2 /volumes/b/_data /workspace rw - xfs /dev/sdb1 rw
";
        let found = outside(
            theirs.as_bytes(),
            OURS.as_bytes(),
            &[Path::new("/workspace")],
        );
        let expected = [
            "/containers/c/hosts",
            "/data/volumes/a/_data",
            "/data/volumes/b/_data",
        ]
        .map(PathBuf::from);
        assert_eq!(found, expected);
    }
}
