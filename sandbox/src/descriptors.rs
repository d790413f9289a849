//! Files in memory that a child opens by their path under `/proc`, and the check that no other
//! descriptor reaches it. Secrets travel this way: neither a disk nor the list of processes shows
//! them.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::Error;
use crate::detect::find;

/// A file in memory, empty or with content.
pub(crate) struct MemoryFile(File);

impl MemoryFile {
    pub(crate) fn new(content: &[u8]) -> Result<Self, Error> {
        let fd = memfd_create("artel-sandbox", MemfdFlags::CLOEXEC)
            .map_err(|errno| Error::start("making a file in memory")(errno.into()))?;
        let mut file = File::from(fd);
        file.write_all(content)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .map_err(Error::start("writing a file in memory"))?;
        Ok(Self(file))
    }

    /// Where another process of the same user finds it, as long as this one lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// What was written to it by now.
    pub(crate) fn read(&mut self) -> String {
        let mut text = String::new();
        let read = self
            .0
            .seek(SeekFrom::Start(0))
            .and_then(|_| (&self.0).take(64 * 1024).read_to_string(&mut text));
        if read.is_err() {
            text.clear();
        }
        text
    }

    pub(crate) fn into_file(self) -> File {
        self.0
    }
}

/// The highest descriptor of this process above `floor` that a child would inherit.
pub(crate) fn highest_inheritable(floor: u32) -> Option<u32> {
    const CLOEXEC: u32 = 0o2_000_000;
    let entries = std::fs::read_dir("/proc/self/fd").ok()?;
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|fd| *fd > floor)
        .filter(|fd| {
            std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))
                .ok()
                .and_then(|info| {
                    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
                    u32::from_str_radix(flags.trim(), 8).ok()
                })
                .is_some_and(|flags| flags & CLOEXEC == 0)
        })
        .max()
}

/// A shell's script that closes everything that was left open for us by whoever started us,
/// whatever its number, and then becomes the command in its arguments.
pub(crate) const CLOSE_AND_RUN: &str = "for f in /proc/self/fd/*; do n=${f##*/}; \
    if [ \"$n\" -gt 2 ]; then eval \"exec $n>&-\"; fi; done; exec \"$@\"";

/// A command for a process that outlives us, unconfined: none of the descriptors that we inherited
/// reach it (a build tool's or a terminal's pipes would stay open as long as it runs), nor does our
/// environment.
pub fn detached(program: &Path) -> Result<Command, Error> {
    let bash = find("bash");
    if bash.is_none()
        && let Some(fd) = highest_inheritable(9)
    {
        return Err(Error::InheritedDescriptor(fd));
    }
    let mut command = Command::new(bash.unwrap_or_else(|| "/bin/sh".into()));
    command.env_clear().arg("-c").arg(CLOSE_AND_RUN);
    command.arg("detached").arg(program);
    Ok(command)
}
