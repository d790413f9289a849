//! Which spawners live, and which did lately.
//!
//! Who lives has a key that expires ([`names::heartbeat`]), and is in a set of names. Who was heard of lately is in a sorted set,
//! by when that was, with a hash of what each said last: so large is who may come back. Both are bounded in number, and expire
//! when nobody is heard of any more.

use redis::Script;
use std::sync::LazyLock;
use std::time::Duration;

use super::link::Link;
use super::queue::millis;
use crate::transport::REMEMBERED;
use crate::{Heartbeat, Seen, Size, TransportError, chain, decode, names};

/// The set of the names of spawners that live; who does not any more is struck off when it is read.
const SPAWNERS: &str = "spawner:heartbeats";
/// How long that set is kept without a heartbeat, in seconds.
const SPAWNERS_S: u64 = names::KEEP_S;

/// Remembers what a spawner said, and forgets those that have been silent for too long, or the longest of too many.
static HEARD: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        redis.call('ZADD', KEYS[1], now, ARGV[1])
        redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
        local function forget(names)
            for _, name in ipairs(names) do
                redis.call('ZREM', KEYS[1], name)
                redis.call('HDEL', KEYS[2], name)
            end
        end
        forget(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3]))
        local more = redis.call('ZCARD', KEYS[1]) - ARGV[4]
        if more > 0 then forget(redis.call('ZRANGE', KEYS[1], 0, more - 1)) end
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
        redis.call('PEXPIRE', KEYS[2], ARGV[3])
        return 1",
    )
});

/// Everybody who was heard of within the time: what was said, and how long ago.
static LATELY: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        local seen = {}
        local heard = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now - ARGV[1], '+inf', 'WITHSCORES')
        for i = 1, #heard, 2 do
            local text = redis.call('HGET', KEYS[2], heard[i])
            if text then seen[#seen + 1] = {text, math.max(0, now - heard[i + 1])} end
        end
        return seen",
    )
});

/// A spawner lives for `lives`, and is remembered for `lately`.
pub(super) async fn beat(
    link: &Link,
    spawner: &str,
    text: &str,
    (lives, lately): (Duration, Duration),
) -> Result<(), TransportError> {
    // Remembered first: who lives is always among those that were heard of.
    link.run(|mut live| async move {
        HEARD
            .key(names::SEEN)
            .key(names::SEEN_BEATS)
            .arg(spawner)
            .arg(text)
            .arg(millis(lately))
            .arg(REMEMBERED)
            .invoke_async::<()>(&mut live)
            .await
    })
    .await?;
    let mut set = redis::cmd("SET");
    set.arg(names::heartbeat(spawner)).arg(text);
    link.ask::<()>(set.arg("PX").arg(millis(lives))).await?;
    link.ask::<()>(redis::cmd("SADD").arg(SPAWNERS).arg(spawner))
        .await?;
    link.ask(redis::cmd("EXPIRE").arg(SPAWNERS).arg(SPAWNERS_S))
        .await
}

/// One spawner of another version hides no other one.
fn readable(text: &[u8]) -> Option<Heartbeat> {
    match decode::heartbeat(text) {
        Ok(beat) => Some(beat),
        Err(error) => {
            let reason = chain(&error);
            tracing::warn!(
                "a heartbeat cannot be read, and its spawner counts as absent: {reason}"
            );
            None
        }
    }
}

pub(super) async fn alive(link: &Link) -> Result<Vec<Heartbeat>, TransportError> {
    let names: Vec<String> = link.ask(redis::cmd("SMEMBERS").arg(SPAWNERS)).await?;
    let mut alive = Vec::new();
    for name in names {
        let key = names::heartbeat(&name);
        let text: Option<Vec<u8>> = link.ask(redis::cmd("GET").arg(key)).await?;
        if let Some(text) = text {
            alive.extend(readable(&text));
        } else {
            let command = redis::cmd("SREM").arg(SPAWNERS).arg(&name).clone();
            link.ask::<()>(&command).await?;
        }
    }
    alive.sort_by(|a: &Heartbeat, b| a.spawner.cmp(&b.spawner));
    Ok(alive)
}

pub(super) async fn lately(link: &Link, within: Duration) -> Result<Vec<Seen>, TransportError> {
    let found: Vec<(Vec<u8>, u64)> = link
        .run(|mut live| async move {
            LATELY
                .key(names::SEEN)
                .key(names::SEEN_BEATS)
                .arg(millis(within))
                .invoke_async(&mut live)
                .await
        })
        .await?;
    let mut seen = Vec::new();
    for (text, silent_ms) in found {
        let silent = Duration::from_millis(silent_ms);
        seen.extend(readable(&text).map(|last| Seen { last, silent }));
    }
    // One of a former version lives without being remembered.
    for last in alive(link).await? {
        if !seen.iter().any(|seen| seen.last.spawner == last.spawner) {
            let silent = Duration::ZERO;
            seen.push(Seen { last, silent });
        }
    }
    seen.sort_by(|a, b| a.last.spawner.cmp(&b.last.spawner));
    Ok(seen)
}

pub(super) async fn farewell(link: &Link, spawner: &str) -> Result<(), TransportError> {
    // Who lives is read last, and must not be found there alone.
    link.ask::<()>(redis::cmd("DEL").arg(names::heartbeat(spawner)))
        .await?;
    link.ask::<()>(redis::cmd("SREM").arg(SPAWNERS).arg(spawner))
        .await?;
    link.ask::<()>(redis::cmd("ZREM").arg(names::SEEN).arg(spawner))
        .await?;
    link.ask(redis::cmd("HDEL").arg(names::SEEN_BEATS).arg(spawner))
        .await
}

/// What is noted of a job while it is not over.
pub(super) fn noted(size: Size) -> String {
    format!("{} {}", size.cpu_milli, size.memory_mb)
}

/// None of what a former version noted, which was nothing.
pub(super) fn read_note(note: &[u8]) -> Option<Size> {
    let (cpu_milli, memory_mb) = std::str::from_utf8(note).ok()?.split_once(' ')?;
    Some(Size {
        cpu_milli: cpu_milli.parse().ok()?,
        memory_mb: memory_mb.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_of_a_job_is_read_again_and_what_is_no_note_says_nothing() {
        let size = Size::new(2.5, 4096);
        assert_eq!(read_note(noted(size).as_bytes()), Some(size));
        for other in ["", "2500", "a b", "1 2 3", "-1 2"] {
            assert_eq!(read_note(other.as_bytes()), None, "{other}");
        }
    }
}
