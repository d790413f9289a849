//! What is left on an engine of homes whose spawners never come back: a machine's disk was replaced, `ARTEL_HOME` moved.
//!
//! A spawner clears away what has ended in its own home within a day or so. What has been over for a week, and its time as well,
//! is therefore of a home in which nobody works any more, and whoever shares the engine removes it: with it go evidence that
//! nobody asks for and what the container has written beside its workspace, which stays in its home. What runs is never touched:
//! a worker that nobody ends ends by itself ([`sandbox::launcher::MOST_S`]).

use super::{Engine, Error, HOME_LABEL, LABEL, is_missing, is_of, patiently};
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum};
use bollard::query_parameters::{ListContainersOptionsBuilder, RemoveContainerOptionsBuilder};
use jiff::Timestamp;
use std::collections::HashMap;
use std::time::Duration;

/// How long something has to be over.
const OVER: Duration = Duration::from_hours(24 * 7);

impl Engine {
    /// Removes what has been over for a week and is of another home than this one; says how many containers that were.
    pub async fn remove_abandoned(&self, home: &str) -> Result<usize, Error> {
        let label = format!("{LABEL}.{HOME_LABEL}");
        let options = ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&HashMap::from([("label", vec![label.clone()])]))
            .build();
        let found = patiently(|| self.docker.list_containers(Some(options.clone())))
            .await
            .map_err(Error::refused("to list containers"))?;
        let over_s = i64::try_from(OVER.as_secs()).unwrap_or(i64::MAX);
        let before_s = Timestamp::now().as_second().saturating_sub(over_s);
        let mut count = 0;
        for container in found {
            let labels = container.labels.unwrap_or_default();
            let is_others = labels.contains_key(&label) && !is_of(&labels, home);
            let (Some(id), Some(made_s)) = (container.id, container.created) else {
                continue;
            };
            if !is_others || made_s >= before_s {
                continue;
            }
            let about = match patiently(|| self.docker.inspect_container(&id, None)).await {
                Ok(about) => about,
                Err(error) if is_missing(&error) => continue,
                Err(error) => return Err(Error::refused("to look at a container")(error)),
            };
            let deadline = labels.get(&format!("{LABEL}.deadline"));
            let deadline_s = deadline.and_then(|text| text.parse::<i64>().ok());
            let is_over = ended_s(&about, made_s).is_some_and(|ended_s| ended_s < before_s);
            if is_over && deadline_s.is_none_or(|deadline_s| deadline_s < before_s) {
                count += usize::from(self.remove_ended(&id).await?);
            }
        }
        if count > 0 {
            tracing::info!(
                "{count} containers were removed that other homes have left and nobody has cleared away for a week"
            );
        }
        Ok(count)
    }

    /// Removes a container unless it runs, and says whether it did.
    async fn remove_ended(&self, id: &str) -> Result<bool, Error> {
        // Never by force: whoever has started it meanwhile wants it.
        let options = RemoveContainerOptionsBuilder::default()
            .force(false)
            .v(true)
            .build();
        match self.docker.remove_container(id, Some(options)).await {
            Ok(()) => Ok(true),
            // It is gone, or runs, or somebody else removes it.
            Err(DockerError::DockerResponseServerError {
                status_code: 404 | 409,
                ..
            }) => Ok(false),
            Err(error) => Err(Error::refused("to remove a container")(error)),
        }
    }
}

/// Since when it has not run, in seconds since 1970; none when it is not over, or nobody knows.
fn ended_s(about: &ContainerInspectResponse, made_s: i64) -> Option<i64> {
    let state = about.state.as_ref()?;
    match state.status? {
        // It was made and never begun, as by an engine that was killed in between.
        ContainerStateStatusEnum::CREATED => Some(made_s),
        ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD => {
            let ended = state.finished_at.as_ref()?.parse::<Timestamp>().ok()?;
            Some(ended.as_second())
        }
        _ => None,
    }
}
