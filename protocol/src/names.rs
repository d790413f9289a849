//! The literal names of streams, channels and keys, the same for every transport that has names.

/// Stream of [`crate::SpawnRequest`], one field [`FIELD`], read by the group [`GROUP_SPAWNERS`].
pub const JOBS: &str = "worker:jobs";
/// Consumer group of the spawners on [`JOBS`].
pub const GROUP_SPAWNERS: &str = "spawners";
/// Pub/sub channel that announces a request id, so that spawners wake without polling.
pub const SPAWN: &str = "worker:spawn";
/// Stream of [`crate::WorkerResult`], one field [`FIELD`], read by the group [`GROUP_CREW`].
pub const RESULTS: &str = "worker:results";
/// Consumer group of the crew on [`RESULTS`].
pub const GROUP_CREW: &str = "crew";
/// Pub/sub channel of [`crate::ControlMessage`].
pub const CONTROL: &str = "worker:control";
/// Stream of poison messages, with the fields `reason` and [`FIELD`].
pub const DEAD: &str = "worker:dead";
/// The one field of a stream entry: the message as JSON.
pub const FIELD: &str = "data";
/// How long a result stays readable after it was written, in seconds.
pub const KEEP_S: u64 = 24 * 60 * 60;
/// How long a request stays known that is never over, in seconds: much longer than anybody waits. A cancel order is kept as long,
/// because its request may wait for so long.
pub const KEEP_UNSETTLED_S: u64 = 30 * KEEP_S;

/// Channel and key of the result of one request.
pub fn result(request_id: &str) -> String {
    format!("worker:result:{request_id}")
}

/// Stream and channel of the events of one request.
pub fn events(request_id: &str) -> String {
    format!("worker:events:{request_id}")
}

/// Key that exists when the request was cancelled.
pub fn cancel(request_id: &str) -> String {
    format!("worker:cancel:{request_id}")
}

/// Sorted set of the spawners that were heard of lately, by when that was, in milliseconds of the server's clock.
pub const SEEN: &str = "{spawner:seen}";
/// Hash of what each of those said last.
pub const SEEN_BEATS: &str = "{spawner:seen}:beats";

/// Key with expiry under which a spawner says that it is alive.
pub fn heartbeat(spawner: &str) -> String {
    format!("spawner:heartbeat:{spawner}")
}
