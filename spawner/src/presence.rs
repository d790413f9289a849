//! Which spawners of this home live: each keeps a file locked, and the kernel lets go of it, however it ends.
//!
//! ```text
//! spawners/{name}     its name; locked while it lives
//! ```
//!
//! Every process has a name of its own, so whoever comes back is a new one for everybody else, and may be smaller than it was. It
//! knows by these files who it was, and says farewell for that one: nobody waits for what has come back already.

use crate::places;
use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// Most that is read of a name, in bytes.
const NAME_BYTES: u64 = 4096;

/// A spawner of this home that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Dead {
    pub(crate) name: String,
    path: PathBuf,
}

/// Shows that the spawner of this name lives, as long as the result is kept; none when one of the same name does already.
/// Blocks.
pub(crate) fn show(home: &Path, name: &str) -> io::Result<Option<File>> {
    let folder = home.join("spawners");
    places::private_folder(&folder)?;
    let _alone = alone(&folder)?;
    let path = folder.join(places::hashed_name(name));
    let mut file = open(&path, true)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    file.set_len(0)?;
    file.write_all(name.as_bytes())?;
    Ok(Some(file))
}

/// Those that do not live any more, but for the one of this name, which is us. Blocks.
pub(crate) fn dead(home: &Path, name: &str) -> io::Result<Vec<Dead>> {
    let folder = home.join("spawners");
    places::private_folder(&folder)?;
    let _alone = alone(&folder)?;
    let mut dead = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let file = open(&path, false)?;
        if file.try_lock().is_err() {
            continue;
        }
        let mut text = String::new();
        // One that was killed before it had written its name was heard of by nobody.
        let _ = file.take(NAME_BYTES).read_to_string(&mut text);
        if text != name {
            dead.push(Dead { name: text, path });
        }
    }
    Ok(dead)
}

/// Forgets one, unless it lives again. Blocks.
pub(crate) fn forget(dead: &Dead) -> io::Result<()> {
    let _alone = dead.path.parent().map(alone).transpose()?;
    if open(&dead.path, false)?.try_lock().is_ok() {
        std::fs::remove_file(&dead.path)?;
    }
    Ok(())
}

/// Nobody else looks, or shows himself, as long as this is kept. Nobody has it for longer than a moment.
fn alone(folder: &Path) -> io::Result<File> {
    let file = File::open(folder)?;
    file.lock()?;
    Ok(file)
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(create);
    options.truncate(false).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_ended_is_found_until_it_is_forgotten_and_who_lives_is_not() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        assert_eq!(dead(home, "us").unwrap(), []);
        let us = show(home, "us").unwrap().unwrap();
        let neighbour = show(home, "a neighbour").unwrap().unwrap();
        let former = show(home, "former/1").unwrap().unwrap();
        assert!(show(home, "us").unwrap().is_none(), "there is one already");
        assert_eq!(dead(home, "us").unwrap(), []);
        drop(former);
        let found = dead(home, "us").unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "former/1");
        // It lives again before it is forgotten.
        let again = show(home, "former/1").unwrap().unwrap();
        forget(&found[0]).unwrap();
        drop(again);
        assert_eq!(dead(home, "us").unwrap(), found);
        forget(&found[0]).unwrap();
        drop((us, neighbour));
        let found = dead(home, "us").unwrap();
        assert_eq!(found.len(), 1, "nobody is dead for himself");
        assert_eq!(found[0].name, "a neighbour");
    }
}
