//! Whether a runtime that is called Sysbox is Sysbox, as far as it matters: root of its container is nobody on this machine.

use super::{Engine, Error, SYSBOX, patiently};
use std::sync::atomic::{AtomicBool, Ordering};

/// What is known of the engine's Sysbox.
#[derive(Debug, Default)]
pub(super) struct Mark {
    /// A container was made for it.
    pub(super) asked: AtomicBool,
    /// One of them had the mark.
    seen: AtomicBool,
}

impl Engine {
    /// Looks whether a container that was just started has what Sysbox gives, if it was asked for, and ends it if not.
    pub(super) async fn is_what_it_is_called(&self, id: &str) -> Result<(), Error> {
        if !self.mark.asked.load(Ordering::Relaxed) {
            return Ok(());
        }
        let about = patiently(|| self.docker.inspect_container(id, None)).await;
        let about = about.map_err(Error::refused("to look at a container"))?;
        let runtime = about.host_config.and_then(|config| config.runtime);
        if runtime.as_deref() != Some(SYSBOX) {
            return Ok(());
        }
        let pid = about.state.and_then(|state| state.pid).unwrap_or_default();
        // As it is seen from here. One that is over already has none.
        let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map"));
        let untold = match map.map(|map| (root_outside(&map), map)) {
            Ok((Some(0), map)) => {
                self.kill(id).await?;
                let words: Vec<&str> = map.split_whitespace().collect();
                return Err(Error::OnlyTheName {
                    uid_map: words.join(" "),
                });
            }
            Ok((Some(_), _)) => {
                self.mark.seen.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Ok((None, _)) => format!("/proc/{pid}/uid_map has no root"),
            Err(error) => format!("/proc/{pid}/uid_map: {error}"),
        };
        if self.mark.seen.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.kill(id).await?;
        Err(Error::Unmarked { reason: untold })
    }
}

/// Who root of a user namespace is outside of it, by the kernel's table: where a range begins inside, where outside, how long
/// it is. None when it is nobody.
fn root_outside(map: &str) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut words = line.split_whitespace().map(str::parse::<u32>);
        match (words.next()?, words.next()?, words.next()?) {
            (Ok(0), Ok(outside), Ok(1..)) => Some(outside),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::root_outside;

    #[test]
    fn root_of_a_namespace_of_its_own_is_somebody_else_outside() {
        assert_eq!(root_outside("         0          0 4294967295\n"), Some(0));
        assert_eq!(root_outside("0 165536 65536\n"), Some(165_536));
        // Whoever else is mapped.
        assert_eq!(root_outside("1 1 65534\n0 200000 1\n"), Some(200_000));
        assert_eq!(root_outside("1000 0 1\n"), None);
        assert_eq!(root_outside(""), None);
    }
}
