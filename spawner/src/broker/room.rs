//! How much memory a worker's questions may take here.
//!
//! A question is kept as it was sent and as JSON until its answer begins, and JSON in memory is many times as large as it is
//! written: `{"":{}}` is seven bytes of one and hundreds of the other. Without a bound a worker could end the spawner, and with it
//! everybody else's work.

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What all questions of a worker may take at a time, in KiB.
const MOST_KIB: usize = 128 * 1024;
/// Parts of JSON that count as a KiB.
const PARTS_A_KIB: usize = 2;

/// The room of one worker.
pub(super) struct Room(Arc<Semaphore>);

/// What one question takes of it.
#[derive(Default)]
pub(super) struct Taken {
    permit: Option<OwnedSemaphorePermit>,
    kib: usize,
}

/// Why there is no room.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// Others have it; they will end.
    Now,
    /// There is never so much.
    Ever,
}

impl Room {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(MOST_KIB)))
    }

    /// Makes what is taken at least as large as this many bytes.
    pub(super) fn hold(&self, taken: &mut Taken, bytes: usize) -> Result<(), Full> {
        self.grow(taken, bytes.div_ceil(1024))
    }

    /// The same for what these bytes, which are held already, are as JSON.
    pub(super) fn hold_parsed(&self, taken: &mut Taken, json: &[u8]) -> Result<(), Full> {
        let kib = taken.kib.saturating_add(parts(json) / PARTS_A_KIB);
        self.grow(taken, kib)
    }

    fn grow(&self, taken: &mut Taken, kib: usize) -> Result<(), Full> {
        if kib > MOST_KIB {
            return Err(Full::Ever);
        }
        let more = kib.saturating_sub(taken.kib);
        if more == 0 {
            return Ok(());
        }
        let permit = u32::try_from(more)
            .ok()
            .and_then(|more| Arc::clone(&self.0).try_acquire_many_owned(more).ok())
            .ok_or(Full::Now)?;
        match &mut taken.permit {
            Some(held) => held.merge(permit),
            none => *none = Some(permit),
        }
        taken.kib = kib;
        Ok(())
    }
}

/// About how many values and names JSON has: whatever divides them, outside of strings.
fn parts(json: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (1, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'{' | b'[' | b',' | b':' if !quoted => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_outside_of_strings() {
        assert_eq!(parts(b"1"), 1);
        assert_eq!(parts(br#"{"a": [1, 2], "b,{": "\",[[["}"#), 7);
        assert_eq!(parts(br#"["\\", 1]"#), 3);
    }

    #[test]
    fn what_is_taken_is_given_back_and_never_more_than_there_is() {
        let room = Room::new();
        let mut first = Taken::default();
        room.hold(&mut first, 100 << 20).unwrap();
        room.hold(&mut first, 1).unwrap();
        let mut second = Taken::default();
        room.hold(&mut second, 10 << 20).unwrap();
        assert_eq!(room.hold(&mut second, 29 << 20), Err(Full::Now));
        room.hold(&mut second, 28 << 20).unwrap();
        drop(first);
        room.hold(&mut second, 128 << 20).unwrap();
        assert_eq!(room.hold(&mut second, 129 << 20), Err(Full::Ever));
        drop(second);
        let bomb = "{\"\":{}},".repeat(1 << 17);
        let mut third = Taken::default();
        room.hold(&mut third, bomb.len()).unwrap();
        assert_eq!(
            room.hold_parsed(&mut third, bomb.as_bytes()),
            Err(Full::Ever)
        );
        let mut text = Taken::default();
        let long = format!("[\"{}\"]", "x,".repeat(1 << 20));
        room.hold(&mut text, long.len()).unwrap();
        room.hold_parsed(&mut text, long.as_bytes()).unwrap();
    }
}
