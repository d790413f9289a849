//! A stream with one consumer group as a queue: each entry is handed out until it is settled.
//!
//! An entry leaves the stream when it is settled, in the same script; nothing trims the stream, so nothing that is pending
//! can be lost to a trim. What is full refuses. Every key of a queue begins with the stream's name in braces, so that a cluster
//! keeps them on one node and a script may touch them together.

use redis::{RedisResult, Script};
use std::sync::LazyLock;
use std::time::Duration;

use super::link::{Link, Live};
use crate::{Published, Room, TransportError, names};

/// Most entries that are looked at for the next job; a script can handle no more at a time.
const MOST_LOOKED_AT: usize = 4096;

/// Appends an entry, unless one with this id is there, or was over within the last day. What is known for longer is not over; if
/// its entry is gone nevertheless, somebody has deleted it, or the stream.
static PUBLISH: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        if redis.call('EXISTS', KEYS[2]) == 1 then
            local at = redis.call('GET', KEYS[3])
            if not at or redis.call('TTL', KEYS[2]) <= tonumber(ARGV[5]) then return 0 end
            if #redis.call('XRANGE', KEYS[1], at, at) == 1 then return 0 end
        end
        if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[2]) then return -1 end
        local entry = redis.call('XADD', KEYS[1], '*', 'data', ARGV[1])
        redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
        redis.call('SET', KEYS[3], entry, 'EX', ARGV[4])
        return 1",
    )
});

/// Takes the oldest entry whose hold has run out, else the next new one. The sweep goes to the end of the pending list: a page
/// without an expired entry says nothing about the next page.
static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local function handed(entry)
            local data
            local fields = entry[2]
            -- Twice is no message, and is put aside as it is.
            for i = 1, #fields, 2 do
                if fields[i] == 'data' then data = data and data .. '\n' .. fields[i + 1] or fields[i + 1] end
            end
            local held = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
            return {entry[1], data or '', held[1][4]}
        end
        local cursor = '0-0'
        repeat
            local page = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], cursor, 'COUNT', 1)
            if #page[2] > 0 then return handed(page[2][1]) end
            cursor = page[1]
        until cursor == '0-0'
        local new = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
        if new then return handed(new[1][2][1]) end
        return false",
    )
});

/// Hands out the next job for a room: what [`crate::room::choose`] says, in one step on the server.
///
/// What is new is first put into the pending list, held by nobody, so that every job can be looked at and any of them be taken;
/// the number of its deliveries stays 0. Size, project and request of each are kept in a hash. What cannot be read fits
/// everywhere, and is found out by whoever gets it.
static TAKE_FOR: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("take_for.lua")));

/// What each of the next three begins with: whether the entry is still held under this receipt.
const HELD: &str = r"
        local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
        if #held == 0 or held[1][2] ~= ARGV[3] or held[1][4] ~= tonumber(ARGV[4]) then return 0 end
";

/// The entry is over; its id stays known for a day.
static SETTLE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        r"{HELD}
        redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
        redis.call('XDEL', KEYS[1], ARGV[2])
        redis.call('HDEL', KEYS[3], ARGV[2])
        redis.call('EXPIRE', KEYS[2], ARGV[5])
        redis.call('DEL', KEYS[4])
        return 1"
    ))
});

/// The holder lives: the entry counts as handed out just now. (`JUSTID` leaves the number of deliveries alone.)
static RENEW: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        r"{HELD}
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[2], 'IDLE', 0, 'JUSTID')
        return 1"
    ))
});

/// The holder gives it back: it belongs to nobody, and its hold has run out.
static RELEASE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        r"{HELD}
        redis.call('XCLAIM', KEYS[1], ARGV[1], 'nobody', 0, ARGV[2], 'IDLE', ARGV[5], 'JUSTID')
        return 1"
    ))
});

/// A holder is dead: what it held belongs to nobody, and the hold of it has run out. Says how much that was.
static ABANDON: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local freed = 0
        -- Nobody's are free already, and would be found again for ever.
        if ARGV[2] == 'nobody' then return freed end
        repeat
            local page = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100, ARGV[2])
            for _, held in ipairs(page) do
                redis.call('XCLAIM', KEYS[1], ARGV[1], 'nobody', 0, held[1], 'IDLE', ARGV[3], 'JUSTID')
                freed = freed + 1
            end
        until #page == 0
        return freed",
    )
});

/// Strikes consumers off that hold nothing and were not heard of for long; every start of a program makes one. Who lives and is
/// struck off becomes one again with what it takes next.
static FORGET: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
            local about = {}
            for i = 1, #consumer, 2 do about[consumer[i]] = consumer[i + 1] end
            if about.pending == 0 and about.idle > tonumber(ARGV[2]) then
                redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], about.name)
            end
        end
        return 1",
    )
});

/// An entry in somebody's hand.
pub(super) struct Handed {
    entry: String,
    consumer: String,
    /// The message, as it came.
    pub data: Vec<u8>,
    pub deliveries: u32,
}

impl Handed {
    /// Names this delivery. `request_id` is that of the message; empty when it cannot be read.
    pub fn receipt(&self, request_id: &str) -> String {
        format!(
            "{}/{}/{}/{request_id}",
            self.entry, self.consumer, self.deliveries
        )
    }
}

/// A stream, its group, and who we are in it.
pub(super) struct Queue {
    pub stream: &'static str,
    group: &'static str,
    consumer: String,
    capacity: usize,
    lease: Duration,
}

impl Queue {
    pub fn new(
        stream: &'static str,
        group: &'static str,
        consumer: &str,
        capacity: usize,
        lease: Duration,
    ) -> Self {
        Self {
            stream,
            group,
            consumer: consumer.to_owned(),
            capacity,
            lease,
        }
    }

    /// The key under which a request is known to this queue, for a day after it was settled.
    pub fn known(&self, request_id: &str) -> String {
        format!("{{{}}}:known:{request_id}", self.stream)
    }

    /// The key of the place that a request has in the stream, while it is not over.
    fn place(&self, request_id: &str) -> String {
        format!("{{{}}}:at:{request_id}", self.stream)
    }

    /// The hash of what is known of the entries.
    fn about(&self) -> String {
        format!("{{{}}}:about", self.stream)
    }

    /// Makes stream and group if they are not there, and forgets consumers that are gone for good.
    pub async fn prepare(&self, link: &Link, forget: Duration) -> Result<(), TransportError> {
        link.run(|mut live| async move {
            self.make(&mut live).await?;
            FORGET
                .key(self.stream)
                .arg(self.group)
                .arg(millis(forget))
                .invoke_async::<()>(&mut live)
                .await
        })
        .await
    }

    async fn make(&self, live: &mut Live) -> RedisResult<()> {
        let made = redis::cmd("XGROUP")
            .arg("CREATE")
            .arg(self.stream)
            .arg(self.group)
            .arg("0")
            .arg("MKSTREAM")
            .query_async::<()>(live)
            .await;
        match made {
            Err(error) if error.code() == Some("BUSYGROUP") => Ok(()),
            made => made,
        }
    }

    /// Appends a message. `remembered` is what [`Queue::known`] then holds.
    pub async fn publish(
        &self,
        link: &Link,
        request_id: &str,
        data: &str,
        remembered: &str,
    ) -> Result<Published, TransportError> {
        let answer: i64 = link
            .run(|mut live| async move {
                PUBLISH
                    .key(self.stream)
                    .key(self.known(request_id))
                    .key(self.place(request_id))
                    .arg(data)
                    .arg(self.capacity)
                    .arg(remembered)
                    // Without an end it would stay for ever when its entry is lost.
                    .arg(names::KEEP_UNSETTLED_S)
                    .arg(names::KEEP_S)
                    .invoke_async(&mut live)
                    .await
            })
            .await?;
        match answer {
            1 => Ok(Published::New),
            0 => Ok(Published::Known),
            _ => Err(TransportError::Full {
                queue: self.stream,
                limit: self.capacity,
            }),
        }
    }

    /// The oldest entry that nobody holds, if there is one.
    pub async fn take(&self, link: &Link) -> Result<Option<Handed>, TransportError> {
        self.hand(link, None).await
    }

    /// The next entry for this room, if there is one.
    pub async fn take_for(
        &self,
        link: &Link,
        room: &Room,
    ) -> Result<Option<Handed>, TransportError> {
        self.hand(link, Some(room)).await
    }

    async fn hand(
        &self,
        link: &Link,
        room: Option<&Room>,
    ) -> Result<Option<Handed>, TransportError> {
        let found: Option<(String, Vec<u8>, u32)> = link
            .run(|mut live| async move {
                match self.try_hand(&mut live, room).await {
                    // Redis has lost its data since we began.
                    Err(error) if error.code() == Some("NOGROUP") => {
                        self.make(&mut live).await?;
                        self.try_hand(&mut live, room).await
                    }
                    taken => taken,
                }
            })
            .await?;
        Ok(found.map(|(entry, data, deliveries)| Handed {
            entry,
            consumer: self.consumer.clone(),
            data,
            deliveries,
        }))
    }

    async fn try_hand(
        &self,
        live: &mut Live,
        room: Option<&Room>,
    ) -> RedisResult<Option<(String, Vec<u8>, u32)>> {
        match room {
            Some(room) => self.try_take_for(live, room).await,
            None => self.try_take(live).await,
        }
    }

    async fn try_take(&self, live: &mut Live) -> RedisResult<Option<(String, Vec<u8>, u32)>> {
        TAKE.key(self.stream)
            .arg(self.group)
            .arg(&self.consumer)
            .arg(millis(self.lease))
            .invoke_async(live)
            .await
    }

    async fn try_take_for(
        &self,
        live: &mut Live,
        room: &Room,
    ) -> RedisResult<Option<(String, Vec<u8>, u32)>> {
        let mut take = TAKE_FOR.key(self.stream);
        take.key(self.about())
            .arg(self.group)
            .arg(&self.consumer)
            .arg(millis(self.lease))
            .arg(self.capacity.min(MOST_LOOKED_AT))
            .arg(millis(room.patience))
            // Not a number: it waits on.
            .arg(
                room.grace
                    .map_or_else(String::new, |grace| millis(grace).to_string()),
            )
            .arg(room.ours.len());
        for request in &room.ours {
            take.arg(request);
        }
        for size in [room.free, room.whole].iter().chain(&room.others) {
            take.arg(size.cpu_milli).arg(size.memory_mb);
        }
        take.invoke_async(live).await
    }

    pub async fn renew(&self, link: &Link, receipt: &str) -> Result<(), TransportError> {
        self.held(link, &RENEW, receipt, 0).await
    }

    pub async fn release(&self, link: &Link, receipt: &str) -> Result<(), TransportError> {
        let idle = millis(self.lease).saturating_add(1);
        self.held(link, &RELEASE, receipt, idle).await
    }

    /// Frees what a dead holder held; says how much that was.
    pub async fn abandon(&self, link: &Link, holder: &str) -> Result<u32, TransportError> {
        let idle = millis(self.lease).saturating_add(1);
        link.run(|mut live| async move {
            let freed = ABANDON
                .key(self.stream)
                .arg(self.group)
                .arg(holder)
                .arg(idle)
                .invoke_async(&mut live)
                .await;
            nothing_if_lost(freed)
        })
        .await
    }

    /// The entry is over; its request stays known for a day.
    pub async fn settle(&self, link: &Link, receipt: &str) -> Result<(), TransportError> {
        self.held(link, &SETTLE, receipt, names::KEEP_S).await
    }

    async fn held(
        &self,
        link: &Link,
        script: &Script,
        receipt: &str,
        argument: u64,
    ) -> Result<(), TransportError> {
        let not_held = || TransportError::NotHeld {
            receipt: receipt.to_owned(),
        };
        let parts: Vec<&str> = receipt.split('/').collect();
        let [entry, consumer, deliveries, request_id] = parts[..] else {
            return Err(not_held());
        };
        let done: bool = link
            .run(|mut live| async move {
                let done = script
                    .key(self.stream)
                    .key(self.known(request_id))
                    .key(self.about())
                    .key(self.place(request_id))
                    .arg(self.group)
                    .arg(entry)
                    .arg(consumer)
                    .arg(deliveries)
                    .arg(argument)
                    .invoke_async(&mut live)
                    .await;
                nothing_if_lost(done)
            })
            .await?;
        if done { Ok(()) } else { Err(not_held()) }
    }
}

/// Of a stream that Redis has lost, or somebody deleted, nobody holds anything.
fn nothing_if_lost<T: Default>(answer: RedisResult<T>) -> RedisResult<T> {
    match answer {
        Err(error) if error.code() == Some("NOGROUP") => Ok(T::default()),
        answer => answer,
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
