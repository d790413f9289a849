//! How much room directories take.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::detect::{answer, find};

/// More entries than this are not looked at.
const MOST_ENTRIES: usize = 2_000_000;

/// MiB on disk under a folder: of what can be looked at, so at least so many. Links are not followed. Blocks.
pub fn used_mb(folder: &Path) -> u64 {
    measure(&[folder.to_owned()], MOST_ENTRIES).bytes >> 20
}

/// Whether a folder has more than so many MiB on disk. One in which something cannot be counted, because there are more than two
/// million entries or a path is too long for the system, counts as larger than anything: whoever works there would else be
/// bounded by nothing. So does one with a folder that its owner has closed, if it cannot be counted in a user namespace, where we
/// may read what is ours whatever its mode. Links are not followed. Blocks.
pub fn exceeds_mb(folder: &Path, most_mb: u64) -> bool {
    exceeds(&[folder.to_owned()], most_mb.saturating_mul(1 << 20))
}

/// Whether the paths together have more than so many bytes on disk, as in [`exceeds_mb`]. Blocks.
pub fn exceeds(roots: &[PathBuf], most: u64) -> bool {
    let measured = measure(roots, MOST_ENTRIES);
    if measured.bytes > most || !measured.whole {
        return true;
    }
    measured.closed && closed_bytes(roots).is_none_or(|bytes| bytes > most)
}

/// What `du` counts where no mode keeps it out: as root of a user namespace in which there is nobody but us. None when that
/// cannot be had, or takes too long.
fn closed_bytes(roots: &[PathBuf]) -> Option<u64> {
    let (bwrap, du) = (find("bwrap")?, find("du")?);
    let mut command = Command::new(bwrap);
    command.env_clear().env("LC_ALL", "C");
    command.args(["--unshare-user", "--unshare-net", "--unshare-pid"]);
    command.args(["--die-with-parent", "--uid", "0", "--gid", "0"]);
    command.args(["--cap-add", "CAP_DAC_READ_SEARCH"]);
    command.args(["--ro-bind", "/", "/", "--"]);
    command
        .arg(du)
        .args(["--summarize", "--null", "--block-size=1", "--"]);
    let said = answer(command.args(roots))?;
    counted(&said, roots)
}

/// The sum of `BYTES\tROOT\0` for every root, and nothing else.
fn counted(said: &[u8], roots: &[PathBuf]) -> Option<u64> {
    let lines = said.strip_suffix(b"\0")?.split(|byte| *byte == 0);
    let mut sum: u64 = 0;
    let mut left = roots.iter();
    for line in lines {
        let root: &OsStr = left.next()?.as_os_str();
        let tab = line.iter().position(|byte| *byte == b'\t')?;
        let bytes: u64 = std::str::from_utf8(&line[..tab]).ok()?.parse().ok()?;
        if &line[tab + 1..] != root.as_encoded_bytes() {
            return None;
        }
        sum = sum.saturating_add(bytes);
    }
    left.next().is_none().then_some(sum)
}

struct Measured {
    bytes: u64,
    /// Whether everything was looked at.
    whole: bool,
    /// Whether a folder let us not in that is there.
    closed: bool,
}

fn measure(roots: &[PathBuf], most_entries: usize) -> Measured {
    // A folder that waits shares the path of the one that it is in, so that two million of them fit into memory.
    let mut waiting: Vec<(Arc<Path>, OsString)> = Vec::new();
    let mut measured = Measured {
        bytes: 0,
        whole: true,
        closed: false,
    };
    for root in roots {
        if visit(root, &mut measured) {
            waiting.push((root.as_path().into(), OsString::new()));
        }
    }
    let mut seen = 0;
    while let Some((parent, name)) = waiting.pop() {
        let folder: Arc<Path> = if name.is_empty() {
            parent
        } else {
            parent.join(name).into()
        };
        let entries = std::fs::read_dir(&folder);
        if let Err(error) = &entries {
            measured.missed(error);
        }
        for entry in entries.into_iter().flatten().flatten() {
            seen += 1;
            if seen > most_entries {
                measured.whole = false;
                return measured;
            }
            if visit(&entry.path(), &mut measured) {
                waiting.push((Arc::clone(&folder), entry.file_name()));
            }
        }
    }
    measured
}

/// Counts an entry; whether it is a folder.
fn visit(path: &Path, measured: &mut Measured) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(meta) => {
            measured.bytes = measured.bytes.saturating_add(meta.blocks() * 512);
            meta.is_dir()
        }
        Err(error) => {
            measured.missed(&error);
            false
        }
    }
}

impl Measured {
    /// Something could not be looked at. What is gone by now takes no room.
    fn missed(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::InvalidFilename => self.whole = false,
            io::ErrorKind::PermissionDenied => self.closed = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_cannot_be_counted_is_more_than_anything() {
        let folder = tempfile::tempdir().expect("directory");
        for n in 0..20 {
            std::fs::write(folder.path().join(n.to_string()), "x").expect("written");
        }
        let roots = [folder.path().to_owned()];
        assert!(measure(&roots, 20).whole);
        assert!(!measure(&roots, 19).whole);
        assert!(!exceeds_mb(folder.path(), 1));
        // Deeper than a path can say.
        let mut here = openat(
            CWD,
            folder.path(),
            OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .expect("open");
        for _ in 0..30 {
            let name = "d".repeat(200);
            mkdirat(&here, &name, Mode::RWXU).expect("made");
            here = openat(
                &here,
                &name,
                OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .expect("open");
        }
        assert!(exceeds_mb(folder.path(), 1));
        assert_eq!(used_mb(folder.path()), 0);
    }

    /// Says to the run of this test by nobody that it is that.
    const NOBODY: &str = "ARTEL_TEST_AS_NOBODY";

    #[test]
    fn what_is_in_a_folder_that_its_owner_has_closed_is_counted_all_the_same() {
        let name = "what_is_in_a_folder_that_its_owner_has_closed_is_counted_all_the_same";
        if rustix::process::geteuid().is_root() {
            // Root is kept out by no mode: once more as nobody, by a copy that nobody may run.
            assert!(std::env::var_os(NOBODY).is_none(), "we are root still");
            let folder = tempfile::tempdir().expect("directory");
            let open = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(folder.path(), open).expect("open");
            let copy = folder.path().join("test");
            let this = std::env::current_exe().expect("this");
            std::fs::copy(this, &copy).expect("copied");
            let output = Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
                .arg(&copy)
                .args(["--exact", "--nocapture", &format!("disk::tests::{name}")])
                .env(NOBODY, "1")
                .env("TMPDIR", "/tmp")
                .current_dir("/")
                .output()
                .expect("setpriv runs");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success() && said.contains("1 passed"),
                "{output:?}"
            );
            return;
        }
        let folder = tempfile::tempdir().expect("directory");
        let closed = folder.path().join("closed");
        let mode = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&closed, mode).expect("mode");
        };
        std::fs::create_dir(&closed).expect("made");
        std::fs::write(closed.join("large"), vec![1; 3 << 20]).expect("written");
        // Nobody in, nobody to look what is in, nobody to look at what that is.
        for bits in [0o000, 0o300, 0o600] {
            mode(bits);
            assert!(exceeds_mb(folder.path(), 2), "{bits:o}");
            assert!(!exceeds_mb(folder.path(), 4), "{bits:o}");
        }
        mode(0o700);
        assert!(exceeds_mb(folder.path(), 2));
    }

    #[test]
    fn what_du_says_counts_only_if_it_says_all() {
        let roots = ["/a".into(), "/b c".into()];
        let said = |text: &str| counted(text.as_bytes(), &roots);
        assert_eq!(said("5\t/a\x0012\t/b c\0"), Some(17));
        for other in [
            "",
            "5\t/a\0",
            "5\t/a\x0012\t/b c",
            "5\t/a\x0012\t/b\0",
            "5\t/a\0-1\t/b c\0",
            "5\t/a\x0012\t/b c\x001\t/c\0",
        ] {
            assert_eq!(said(other), None, "{other:?}");
        }
    }
}
