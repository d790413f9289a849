//! A service's log: a file with a cap, and the one before it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file larger than this becomes the old one.
const CAP_BYTES: u64 = 4 << 20;
/// How much of the end is looked at for the last lines.
const LOOK_BYTES: u64 = 1 << 20;

/// Appends lines.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    cap: u64,
}

impl Log {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes,
            cap: CAP_BYTES,
        })
    }

    pub(crate) fn line(&mut self, text: &str) -> io::Result<()> {
        if self.bytes > self.cap {
            std::fs::rename(&self.path, old(&self.path))?;
            self.file = File::options().create(true).append(true).open(&self.path)?;
            self.bytes = 0;
        }
        let mut line = Vec::with_capacity(text.len() + 1);
        line.extend(text.as_bytes());
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.file.write_all(&line)
    }
}

/// The last lines of the file and of the one before it, oldest first.
pub(crate) fn last_lines(path: &Path, most: usize) -> io::Result<Vec<String>> {
    let mut lines = file_lines(path)?;
    if lines.len() < most {
        let mut before = file_lines(&old(path))?;
        before.append(&mut lines);
        lines = before;
    }
    let over = lines.len().saturating_sub(most);
    lines.drain(..over);
    Ok(lines)
}

fn file_lines(path: &Path) -> io::Result<Vec<String>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let start = file.metadata()?.len().saturating_sub(LOOK_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOOK_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let cut = usize::from(start > 0);
    Ok(text.lines().skip(cut).map(str::to_owned).collect())
}

fn old(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_rotated_and_read_across_the_seam() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("service.log");
        assert!(last_lines(&path, 5).expect("none").is_empty());
        let mut log = Log::open(&path).expect("opened");
        log.cap = 20;
        for number in 0..12 {
            log.line(&format!("line {number}")).expect("written");
        }
        assert_eq!(
            std::fs::read_dir(directory.path()).expect("listed").count(),
            2
        );
        let lines = last_lines(&path, 4).expect("read");
        assert_eq!(lines, ["line 8", "line 9", "line 10", "line 11"]);
    }
}
