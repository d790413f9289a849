//! Messages between the processes that share a database. A checkpointer without a bell promises nothing about them.

use std::time::Duration;

use futures::{StreamExt, stream::BoxStream};

use super::Lab;
use crate::checkpoint::MAX_MESSAGE_BYTES;

async fn next(stream: &mut BoxStream<'static, String>) -> String {
    tokio::time::timeout(Duration::from_secs(10), stream.next())
        .await
        .expect("something is heard")
        .expect("the stream goes on")
}

/// All who listen hear all messages in the order in which they were sent, from whichever process; those who left hear none.
pub async fn what_is_rung_is_heard_by_all_who_listen_in_order(lab: &Lab) {
    let (Some(one), Some(two)) = (lab.db.bell(), lab.open().await.bell()) else {
        return;
    };
    let mut first = one.listen().await.expect("listens");
    let mut second = two.listen().await.expect("listens");
    drop(two.listen().await.expect("listens"));
    for number in 0..5 {
        one.ring(&format!("one {number}")).await.expect("rings");
    }
    for ear in [&mut first, &mut second] {
        for number in 0..5 {
            assert_eq!(next(ear).await, format!("one {number}"));
        }
    }
    drop(first);
    two.ring("two").await.expect("rings");
    assert_eq!(next(&mut second).await, "two");
}

/// A message of the greatest length arrives whole; that nobody listens is no error.
pub async fn a_long_message_is_carried_and_nobody_needs_to_listen(lab: &Lab) {
    let Some(bell) = lab.db.bell() else {
        return;
    };
    bell.ring("nobody").await.expect("rings");
    let mut ear = bell.listen().await.expect("listens");
    let message = "x".repeat(MAX_MESSAGE_BYTES);
    bell.ring(&message).await.expect("rings");
    assert_eq!(next(&mut ear).await, message);
}
