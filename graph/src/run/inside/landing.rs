//! The end of a superstep of a subgraph, and the records that are left of it.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    checkpoint::{Write, WriteKey, WriteKind},
    command::Handover,
    error::NodeError,
    nest::fold_kept,
    plan::Plan,
    run::{
        Broken, Place, Run,
        apply::{SNAPSHOT_AFTER, SNAPSHOT_AT_LAST, Written, kept},
        is_inside,
        tasks::Status,
    },
    state::{Extent, State, channels_weight, snapshot},
};

use super::{
    Inner, Log,
    record::{Given, Recording, appends, weight},
};

impl<T: State> Inner<T> {
    /// All tasks are done: applies their writes, plans, and records that. The last superstep is recorded with the task
    /// around it.
    pub(super) async fn land(&mut self) -> Result<(), NodeError> {
        let run = &mut self.run;
        self.tasks.sort_by_key(|task| task.planned.order);
        let followed = run.shared.engine.bus.is_followed(&run.shared.thread);
        let fresh = run.cacheable(&self.tasks);
        if !self.tasks.iter().all(|task| task.memo.lock().is_pure()) {
            self.place.outer.memo.lock().spoke = true;
        }
        let folded =
            run.fold(&mut self.tasks, followed)
                .and_then(|(written, plan)| match &mut self.total {
                    Some(total) => {
                        let changes = written.json()?;
                        total.merge::<T>(changes.clone());
                        Ok((Written::Json(changes), plan))
                    }
                    None => Ok((written, plan)),
                });
        let (written, plan) = match folded {
            Ok(folded) => folded,
            Err(fault) => {
                let name = run.graph.name.clone();
                let mut left = run.commit();
                Run::record_void(&mut self.tasks, &mut left);
                self.tasks.clear();
                if self.place.records {
                    self.leave(left);
                }
                return Err(NodeError::from(fault)
                    .context(format!("subgraph `{name}`"))
                    .fatal());
            }
        };
        let mut tasks = std::mem::take(&mut self.tasks);
        let handovers: Vec<Handover> = tasks
            .iter_mut()
            .filter_map(|task| match &mut task.status {
                Status::Done(outcome) => Some(std::mem::take(&mut outcome.handovers)),
                _ => None,
            })
            .flatten()
            .collect();
        let added = kept(&mut tasks);
        self.place.kept.lock().extend(added.iter().cloned());
        run.step += 1;
        run.plan = Arc::new(if handovers.is_empty() {
            plan
        } else {
            Plan::default()
        });
        let ends = run.plan.is_empty();
        self.handovers.clone_from(&handovers);
        if !self.place.records {
            let said = tasks
                .iter()
                .flat_map(|task| task.memo.lock().take_said())
                .collect::<Vec<_>>();
            {
                let mut memo = self.place.outer.memo.lock();
                for emission in said {
                    memo.say(emission);
                }
            }
            run.keep_cached(fresh).await;
            if followed {
                run.tell(&tasks, None);
            }
            return Ok(());
        }
        let mut commit = run.commit();
        for task in &tasks {
            let mut memo = task.memo.lock();
            memo.flush_consumed(&mut commit);
            if !task.recorded {
                memo.flush_said(&mut commit);
            }
        }
        let recording = Recording {
            cleans: self.input.is_some() && self.run.graph.on_cancel.is_some(),
            input: self.input.take(),
            written,
            plan: Some(self.run.plan.clone()),
            kept: added,
            handovers,
            ..Recording::default()
        };
        let path = &self.place.path;
        let step = self.run.step;
        commit.forget = self.place.nest.lock().forget_step(path, step);
        if ends {
            commit
                .writes
                .push(record_write(&self.place, step, recording)?);
            self.run.shared.list_waits(path, Vec::new());
            self.place.leave(commit);
        } else {
            let (recording, stale) = self.put_together(recording)?;
            commit.forget.extend(stale);
            commit
                .writes
                .push(record_write(&self.place, step, recording)?);
            let path = &self.place.path;
            let shared = &self.run.shared;
            commit.waits = shared.strike_waits(|wait| is_inside(&wait.task, path));
            self.place
                .share(shared, commit)
                .await
                .map_err(|Broken| NodeError::lost())?;
        }
        self.run.keep_cached(fresh).await;
        if followed {
            self.run.tell(&tasks, None);
        }
        Ok(())
    }

    /// Lets the record of a superstep stand for all before it, if they have become many, and returns the keys of those. But not so
    /// often that putting them together outweighs what changes.
    fn put_together(
        &mut self,
        mut recording: Recording<T>,
    ) -> Result<(Recording<T>, Vec<WriteKey>), NodeError> {
        let log = &mut self.log;
        log.records += 1;
        if let Written::Json(changes) = &recording.written {
            log.weight += weight(changes);
        }
        if log.records < log.next {
            return Ok((recording, Vec::new()));
        }
        let place = &self.place;
        if let Written::Values(_) = &recording.written {
            // Weighed only now.
            let nest = place.nest.lock();
            let records = nest.records(&place.path).into_iter().flatten();
            log.weight = records
                .filter_map(|(_, recorded)| Recording::<T>::read(recorded).ok())
                .filter(|recording| !recording.base)
                .map(|recording| recording.weight())
                .sum();
        }
        let state = &*self.run.state;
        let (given, changes, full) = match &self.total {
            // What it hands back is made of all that changed.
            Some(total) if !self.accumulates => (Given::State, total.clone(), None),
            Some(total) => {
                let appends = total.appends.clone();
                (
                    Given::Kept(T::Update::default()),
                    appends.into(),
                    Some(snapshot(state, Extent::Usual)?),
                )
            }
            None => {
                let appends = appends(state)?;
                (
                    Given::Update(T::Update::default()),
                    appends.into(),
                    Some(snapshot(state, Extent::Usual)?),
                )
            }
        };
        let all = weight(&changes) + full.as_ref().map_or(0, channels_weight);
        if all > log.weight && log.records < SNAPSHOT_AT_LAST {
            log.next = log.records * 2;
            return Ok((recording, Vec::new()));
        }
        *log = Log {
            next: SNAPSHOT_AFTER,
            ..Log::default()
        };
        if let Some(total) = self.total.as_mut().filter(|_| self.accumulates) {
            total.changes.clear();
            self.is_long = true;
        }
        let mut kept = place.kept.lock();
        fold_kept(&mut kept);
        recording = Recording {
            input: Some(given),
            cleans: self.run.graph.on_cancel.is_some(),
            written: Written::Json(changes),
            base: true,
            full,
            kept: kept.clone(),
            ..recording
        };
        let step = round(self.run.step)?;
        let stale = place.nest.lock().forget_before(&place.path, step);
        Ok((recording, stale))
    }
}

pub(super) fn record_write<T: State>(
    place: &Place,
    step: u64,
    recording: Recording<T>,
) -> Result<Write, NodeError> {
    let mut write = Write {
        task: place.path.clone(),
        kind: WriteKind::Sub,
        name: String::new(),
        round: round(step)?,
        value: Value::Null,
        kept: None,
    };
    if place.outer.run.engine.store.keeps_values() {
        write.kept = Some(recording.into());
    } else {
        write.value = serde_json::to_value(recording.record()?)?;
    }
    Ok(write)
}

/// The round under which a superstep is recorded.
fn round(step: u64) -> Result<u32, NodeError> {
    u32::try_from(step).map_err(|error| NodeError::from(error).fatal())
}
