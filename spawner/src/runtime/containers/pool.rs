//! The folders of containers that wait for a job, and which of them are free.
//!
//! ```text
//! pool/{slot}/            a container that was made beforehand; no worker sees this folder
//!     lock                held by whoever has it: the spawner that keeps it free, or watches its worker
//!     workspace/, broker/ what it has mounted, empty; they move to where a task's are when a job takes it
//!     disk.img, disk/     where workspaces are disks of their own: one of these, with the workspace in it (`disk/waits`), which is
//!                         mounted here until the container has it
//!     taken               whose it is since then: what the labels of another container say, which cannot be changed later
//! ```
//!
//! A mount stays with its folder wherever that is moved to, so a workspace and a broker's folder are in the same places
//! whichever kind of container works with them. With disks this has two parts, because a clone should be made where it stays:
//! before the clone the disk becomes the task's, and the container is lent to the request; after it the folders move, on that
//! disk. What stands here was written by us alone.

use super::go::{self, Line};
use crate::disk::{self, Image};
use crate::mirror::try_lock_file;
use crate::places;
use crate::runtime::{Identity, Inside, Limits, Part, SOCKET, Work};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::net::UnixListener;
use tokio::sync::Notify;

/// Most entries of a workspace's root that are moved; one with more is better off with a container of its own.
const ENTRIES: usize = 1000;
const WORKSPACE: &str = "workspace";
const BROKER: &str = "broker";
const LOCK: &str = "lock";
const TAKEN: &str = "taken";

/// Containers that are kept ready.
#[derive(Clone, Debug, PartialEq)]
pub struct Warm {
    /// How many, at most.
    pub count: usize,
    /// What a worker in one may use; a job with other limits of processors, memory or processes gets a container of its own, and
    /// where workspaces are disks of their own, one with another limit of that as well.
    pub limits: Limits,
}

impl Default for Warm {
    /// None.
    fn default() -> Self {
        Self {
            count: 0,
            limits: (&protocol::Limits::default()).into(),
        }
    }
}

/// A container that waits.
pub(super) struct Slot {
    pub(super) place: Place,
    /// The engine's id of it.
    pub(super) container: String,
    /// The image, by id.
    pub(super) image: String,
    pub(super) line: Line,
}

impl Slot {
    /// Whether it still waits, in a container of this image.
    fn is_of(&self, image: &str) -> bool {
        self.image == image && self.line.is_open()
    }
}

/// The folder of a container that waits, and the right to it.
pub(super) struct Place {
    pub(super) folder: PathBuf,
    pub(super) lock: File,
    /// The disk that the workspace is on, when it is one of its own; in a task's folder as soon as the slot is lent.
    disk: Option<Image>,
}

/// Whose a container is that has waited.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Taken {
    pub(super) container: String,
    pub(super) project: String,
    pub(super) job: String,
    pub(super) task: String,
    pub(super) request: String,
    pub(super) attempt: u32,
    /// When it was taken, in seconds since 1970.
    pub(super) at_s: i64,
    /// When its time is over, in seconds since 1970.
    pub(super) deadline_s: i64,
}

impl Taken {
    pub(super) fn is_of(&self, who: &Identity) -> bool {
        self.request == who.request
    }

    pub(super) fn who(&self) -> Identity {
        Identity {
            project: self.project.clone(),
            job: self.job.clone(),
            task: self.task.clone(),
            request: self.request.clone(),
            attempt: self.attempt,
        }
    }
}

pub(super) struct Pool {
    folder: PathBuf,
    pub(super) warm: Warm,
    /// Whether those that wait have disks of their own.
    disks: AtomicBool,
    kept: Mutex<Kept>,
    /// Somebody has taken one, or thrown one away.
    pub(super) changed: Notify,
}

/// What waits.
#[derive(Default)]
struct Kept {
    /// For anybody.
    free: VecDeque<Slot>,
    /// For a request, whose task has the disk already.
    lent: HashMap<String, Slot>,
}

impl Pool {
    pub(super) fn new(home: &Path, warm: Warm) -> Self {
        Self {
            folder: home.join("pool"),
            warm,
            disks: AtomicBool::new(false),
            kept: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on those that are made have disks of their own, or not.
    pub(super) fn set_disks(&self, disks: bool) {
        self.disks.store(disks, Ordering::Relaxed);
    }

    pub(super) fn has_disks(&self) -> bool {
        self.disks.load(Ordering::Relaxed)
    }

    /// Whether this is what a worker here may use.
    pub(super) fn allows(&self, needs: &Limits) -> bool {
        let has = &self.warm.limits;
        (has.memory_mb, has.pids) == (needs.memory_mb, needs.pids)
            && has.cpu.to_bits() == needs.cpu.to_bits()
            && (!self.has_disks() || has.disk_mb == needs.disk_mb)
    }

    /// Whether this is what the containers here are for.
    fn fits(&self, work: &Work) -> bool {
        work.fresh
            && !work.docker
            && work.shown.is_empty()
            && matches!(work.inside, Inside::Agent(_))
            && self.allows(&work.limits)
    }

    /// One for this work, of this image: the one whose disk the task has got, or, where they have none, any. It is the work's
    /// alone now; one that was kept for it and does not fit is let go.
    pub(super) fn take_for(&self, work: &Work, image: &str) -> Option<Slot> {
        if work.part != Part::Agent {
            return None;
        }
        let lent = self.take_lent(&work.who.request);
        let slot = match lent {
            Some(slot) => Some(slot).filter(|slot| slot.is_of(image) && self.fits(work)),
            None if self.has_disks() || !self.fits(work) => return None,
            None => self.take(image),
        };
        self.changed.notify_one();
        slot.filter(|slot| {
            work.relay.as_ref().is_some_and(|relay| {
                let beside = |one: &Path, other: &Path| same_system(one, other).unwrap_or(false);
                beside(&slot.place.workspace(), &work.workspace)
                    && beside(&slot.place.broker(), &relay.folder)
            })
        })
    }

    /// One of this image that still waits for anybody; others are let go.
    pub(super) fn take(&self, image: &str) -> Option<Slot> {
        let mut kept = self.kept();
        loop {
            let slot = kept.free.pop_front()?;
            if slot.is_of(image) {
                return Some(slot);
            }
        }
    }

    /// Keeps one for a request, whose task has its disk now.
    pub(super) fn lend(&self, request: &str, slot: Slot) {
        self.kept().lent.insert(request.to_owned(), slot);
    }

    /// The one that is kept for a request.
    pub(super) fn take_lent(&self, request: &str) -> Option<Slot> {
        self.kept().lent.remove(request)
    }

    pub(super) fn put(&self, slot: Slot) {
        self.kept().free.push_back(slot);
    }

    /// How many wait for anybody.
    pub(super) fn count(&self) -> usize {
        self.kept().free.len()
    }

    /// Lets go of those that wait no more, and says how many.
    pub(super) fn drop_dead(&self) -> usize {
        let mut kept = self.kept();
        let before = kept.free.len() + kept.lent.len();
        kept.free.retain(|slot| slot.line.is_open());
        kept.lent.retain(|_, slot| slot.line.is_open());
        before - kept.free.len() - kept.lent.len()
    }

    /// Lets go of all of them.
    pub(super) fn empty(&self) {
        *self.kept() = Kept::default();
    }

    /// The folder for one more container, without its workspace, and where it will say that it waits.
    pub(super) fn prepare(&self) -> io::Result<(Place, UnixListener)> {
        places::private_folder(&self.folder)?;
        let name = hex::encode(rand::random::<[u8; 8]>());
        let folder = self.folder.join(name);
        places::private_folder(&folder)?;
        let lock = try_lock_file(&folder.join(LOCK), File::try_lock)?
            .ok_or(io::ErrorKind::ResourceBusy)?;
        let disk = self.has_disks().then(|| Image::of(&folder));
        let place = Place { folder, lock, disk };
        let broker = place.broker();
        std::fs::create_dir(&broker)?;
        // As the broker's own.
        std::fs::set_permissions(&broker, Permissions::from_mode(0o711))?;
        let listener = {
            // By way of the folder's descriptor, because the path of a socket has to be short.
            let opened = File::open(&broker)?;
            let near = format!("/proc/self/fd/{}/{}", opened.as_raw_fd(), go::SOCKET);
            UnixListener::bind(near)?
        };
        // The container is somebody else; nobody but containers gets as far as the folder.
        std::fs::set_permissions(place.go(), Permissions::from_mode(0o666))?;
        Ok((place, listener))
    }

    /// All slots there are, of whoever has them.
    pub(super) fn slots(&self) -> io::Result<Vec<PathBuf>> {
        match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// The folder of a slot.
    pub(super) fn slot(&self, name: &str) -> Option<PathBuf> {
        let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        plain.then(|| self.folder.join(name))
    }

    /// What a request has taken, if it has.
    pub(super) fn taken_by(&self, who: &Identity) -> io::Result<Option<(PathBuf, Taken)>> {
        let slots = self.slots()?.into_iter();
        let mut taken = slots.filter_map(|slot| taken(&slot).map(|taken| (slot, taken)));
        Ok(taken.find(|(_, taken)| taken.is_of(who)))
    }
}

/// Who has taken a slot; nobody, if nothing of that can be read.
pub(super) fn taken(slot: &Path) -> Option<Taken> {
    serde_json::from_slice(&std::fs::read(slot.join(TAKEN)).ok()?).ok()
}

/// The right to a slot that nobody has.
pub(super) fn hold(slot: &Path) -> Option<File> {
    try_lock_file(&slot.join(LOCK), File::try_lock)
        .ok()
        .flatten()
}

/// Removes a slot that nobody has. What is mounted there is unmounted before, as after a spawner that died meanwhile. Blocks.
pub(super) fn remove(slot: &Path) -> Result<(), disk::Error> {
    if slot.is_dir() {
        // After whatever a spawner that died has left at work on its disk.
        Image::of(slot).unmount()?;
    }
    disk::unmount_all(slot)?;
    places::remove_any(slot).map_err(disk::at(slot))
}

impl Place {
    pub(super) fn workspace(&self) -> PathBuf {
        let disk = self.disk.as_ref();
        disk.map_or_else(|| self.folder.join(WORKSPACE), Image::waiting)
    }

    /// Makes the workspace, which belongs to `owner`, on a disk of `disk_mb` if it is to have one. Blocks.
    pub(super) fn furnish(
        &self,
        owner: Option<(u32, u32)>,
        disk_mb: u64,
    ) -> Result<(), disk::Error> {
        if let Some(disk) = &self.disk {
            disk.mount(disk_mb)?;
        }
        let workspace = self.workspace();
        let made = std::fs::create_dir(&workspace);
        made.and_then(|()| owner.map_or(Ok(()), |owner| places::hand_to(&workspace, owner)))
            .map_err(disk::at(&workspace))
    }

    /// Undoes the mount of its disk here; the container's own stays. Blocks.
    pub(super) fn unmount(&self) -> Result<(), disk::Error> {
        self.disk.as_ref().map_or(Ok(()), Image::unmount)
    }

    /// Makes its disk the one of a task, by the folder of that one's notes. Returns whether it did. Blocks.
    pub(super) fn lend_disk(&mut self, state: &Path) -> Result<bool, disk::Error> {
        let Some(disk) = &self.disk else {
            return Ok(false);
        };
        let of_task = Image::of(state);
        let lent = of_task.take_over(disk)?;
        if lent {
            self.disk = Some(of_task);
        }
        Ok(lent)
    }

    pub(super) fn broker(&self) -> PathBuf {
        self.folder.join(BROKER)
    }

    fn go(&self) -> PathBuf {
        self.broker().join(go::SOCKET)
    }

    pub(super) fn name(&self) -> String {
        let name = self.folder.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Nobody else is to say that it waits.
    pub(super) fn close_door(&self) -> io::Result<()> {
        places::remove_any(&self.go())
    }

    /// Puts what the container has mounted where the workspace and the broker's folder of a task are, with all that is in these.
    /// Afterwards all is as it would be with any other container, or, after an error, as it was.
    pub(super) fn move_in(&self, workspace: &Path, broker: &Path) -> io::Result<()> {
        move_over(broker, &self.broker(), vec![SOCKET.into()])?;
        let mut names: Vec<OsString> = std::fs::read_dir(workspace)?
            .take(ENTRIES + 1)
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<_>>()?;
        if names.len() > ENTRIES {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        // Without it nothing is a workspace: if we die meanwhile, it is cloned anew.
        names.sort_by_key(|name| name != ".git");
        move_over(workspace, &self.workspace(), names)
    }

    /// Says whose it is, before it begins.
    pub(super) fn sign(&self, taken: &Taken) -> io::Result<()> {
        let aside = self.folder.join("taken.tmp");
        std::fs::write(&aside, serde_json::to_vec(taken)?)?;
        std::fs::rename(aside, self.folder.join(TAKEN))
    }

    /// Nobody has it after all.
    pub(super) fn unsign(&self) -> io::Result<()> {
        places::remove_any(&self.folder.join(TAKEN))
    }
}

/// Moves these entries, which are all there are, from the first folder into the second, and then the second to where the first
/// is. After an error everything is where it was.
fn move_over(from: &Path, to: &Path, names: Vec<OsString>) -> io::Result<()> {
    let mut moved = Vec::new();
    let all = || {
        for name in names {
            std::fs::rename(from.join(&name), to.join(&name))?;
            moved.push(name);
        }
        std::fs::rename(to, from)
    };
    let outcome = all();
    if outcome.is_err() {
        for name in moved {
            std::fs::rename(to.join(&name), from.join(&name))?;
        }
    }
    outcome
}

/// Whether both are on one file system, so that one can be moved to the other.
fn same_system(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(std::fs::metadata(one)?.dev() == std::fs::metadata(other)?.dev())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A task's workspace and its broker's folder, and a slot; a socket needs a runtime.
    fn stage(folder: &Path) -> (PathBuf, PathBuf, Place) {
        let (workspace, broker) = (folder.join("task"), folder.join("task~/broker"));
        std::fs::create_dir_all(workspace.join(".git")).unwrap();
        std::fs::create_dir_all(&broker).unwrap();
        for name in ["task/README.md", "task/.git/HEAD", "task~/broker/socket"] {
            std::fs::write(folder.join(name), name).unwrap();
        }
        let pool = Pool::new(folder, Warm::default());
        let (place, listener) = pool.prepare().unwrap();
        place.furnish(None, 0).unwrap();
        assert_eq!(tree(&place.broker()), ["go"]);
        drop(listener);
        place.close_door().unwrap();
        (workspace, broker, place)
    }

    #[tokio::test]
    async fn what_a_container_has_mounted_becomes_the_workspace_and_the_way_to_the_broker() {
        let folder = tempfile::tempdir().unwrap();
        let (workspace, broker, place) = stage(folder.path());
        let id = |path: &Path| std::fs::metadata(path).unwrap().ino();
        let mounted = (id(&place.workspace()), id(&place.broker()));
        place.move_in(&workspace, &broker).unwrap();
        assert_eq!((id(&workspace), id(&broker)), mounted);
        assert_eq!(tree(&workspace), [".git", "README.md"]);
        assert_eq!(tree(&broker), ["socket"]);
        assert_eq!(tree(&place.folder), ["lock"]);
    }

    #[tokio::test]
    async fn what_cannot_be_moved_as_a_whole_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (workspace, broker, place) = stage(folder.path());
        std::fs::write(broker.join("stranger"), "").unwrap();
        place.move_in(&workspace, &broker).unwrap_err();
        assert_eq!(tree(&broker), ["socket", "stranger"]);
        assert_eq!(tree(&workspace), [".git", "README.md"]);
        std::fs::remove_file(broker.join("stranger")).unwrap();
        for n in 0..ENTRIES {
            std::fs::write(workspace.join(n.to_string()), "").unwrap();
        }
        place.move_in(&workspace, &broker).unwrap_err();
        assert_eq!(tree(&workspace).len(), ENTRIES + 2);
        assert_eq!(tree(&broker), ["socket"]);
    }

    #[tokio::test]
    async fn who_has_taken_a_slot_is_known_to_whoever_comes_next() {
        let folder = tempfile::tempdir().unwrap();
        let (_, _, place) = stage(folder.path());
        let pool = Pool::new(folder.path(), Warm::default());
        let who = Identity {
            project: "p".to_owned(),
            job: "j".to_owned(),
            task: "t".to_owned(),
            request: "r".to_owned(),
            attempt: 1,
        };
        assert!(pool.taken_by(&who).unwrap().is_none());
        let taken = Taken {
            container: "c".to_owned(),
            project: who.project.clone(),
            job: who.job.clone(),
            task: who.task.clone(),
            request: who.request.clone(),
            attempt: who.attempt,
            at_s: 1,
            deadline_s: 2,
        };
        place.sign(&taken).unwrap();
        let (slot, found) = pool.taken_by(&who).unwrap().unwrap();
        assert_eq!(
            (slot.as_path(), found.container.as_str()),
            (place.folder.as_path(), "c")
        );
        assert!(hold(&slot).is_none(), "somebody has it");
        drop(place);
        assert!(hold(&slot).is_some(), "nobody has it any more");
        assert_eq!(pool.slot("../x"), None);
    }
}
