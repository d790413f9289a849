//! Stepping by hand: stopping before and after named nodes.

use std::sync::Arc;

use serde_json::json;

use crate::{
    checkpoint::{Then, WaitKind, WaitRecord, WriteKind},
    memo::{Memo, Waiting},
    state::State,
    waits::arrival,
};

use super::{Broken, Flow, Run};

/// The task path of the stops.
pub(super) const PAUSE: &str = "~pause";

impl<S: State> Run<S> {
    /// The stops before the coming superstep.
    pub(super) fn stops(&self) -> Vec<Waiting> {
        if self.plan.pause_after.is_empty() && self.graph.pause_before.is_empty() {
            return Vec::new();
        }
        let after = self
            .plan
            .pause_after
            .iter()
            .map(|node| format!("after:{node}"));
        let next = self.plan.names();
        let before = self
            .graph
            .pause_before
            .iter()
            .filter(|node| next.contains(node))
            .map(|node| format!("before:{node}"));
        let stops: Vec<String> = after.chain(before).collect();
        if stops.is_empty() {
            return Vec::new();
        }
        let task = self.path(PAUSE);
        stops
            .into_iter()
            .map(|name| Waiting {
                record: WaitRecord {
                    id: self.wait_id(&task, &name, 0),
                    kind: WaitKind::Interrupt,
                    task: task.clone(),
                    value: json!({ "next": &next }),
                    signals: Vec::new(),
                    children: Vec::new(),
                    until: None,
                    name: name.clone(),
                },
                space: name,
                round: 0,
            })
            .collect()
    }

    /// Nothing runs next, but the thread is to stop after what ran last.
    pub(super) async fn stop_after_all(&mut self) -> Result<Flow, Broken> {
        if self.shared.controls.drain.is_cancelled() {
            let mut commit = self.commit();
            commit.then = Then::Yield;
            self.keep(&mut commit);
            self.shared.commit(commit).await?;
            return Ok(Flow::Released);
        }
        let flow = self.pause().await?;
        if let Flow::On = flow
            && !self.must_make_way()
        {
            Arc::make_mut(&mut self.plan).pause_after.clear();
        }
        Ok(flow)
    }

    /// Stops before or after named nodes until somebody lets the thread go on.
    pub(super) async fn pause(&mut self) -> Result<Flow, Broken> {
        let stops = self.stops();
        if stops.is_empty() {
            return Ok(Flow::On);
        }
        let mut memo = Memo::default();
        for write in self.writes.remove(PAUSE).unwrap_or_default() {
            memo.restore(&write);
        }
        memo.waits = stops;
        loop {
            let mut open = Vec::new();
            for wait in memo.waits.clone() {
                if memo.get(WriteKind::Wait, &wait.space, 0).is_some() {
                    continue;
                }
                let answer = self
                    .shared
                    .mailbox
                    .lock()
                    .take(|signal| arrival(&wait.record, signal));
                match answer {
                    Some((value, number)) => {
                        memo.note(PAUSE, WriteKind::Wait, &wait.space, 0, value, Some(number));
                        self.waited();
                    }
                    None => open.push(wait.record),
                }
            }
            if self.shared.controls.cancel.is_cancelled() {
                return self.cancel(Vec::new()).await.map(|()| Flow::Released);
            }
            if self.must_make_way() {
                return Ok(Flow::On);
            }
            let mut commit = self.commit();
            memo.flush_memory(&mut commit);
            if open.is_empty() {
                if commit != self.commit() {
                    self.land(commit, &[]).await?;
                }
                return Ok(Flow::On);
            }
            if let Flow::Released = self.suspend(commit, open, &[]).await? {
                return Ok(Flow::Released);
            }
        }
    }
}
