//! `artel demo`: the main job from the tape that ships with the program, then a change to what runs.

use ports::{FrontDesk, ProjectId};

use crate::app::App;
use crate::lines::{End, EndStatus};
use crate::words;

use super::{Context, talk};

const WISH: &str = "I want to keep short notes on my machine, over HTTP and on a page.";
const CHANGE: &str = "Let me search in my notes.";

/// Builds the demo; its last lines say where it answers and how to stop it.
pub(super) async fn run(context: &Context) -> anyhow::Result<u8> {
    let mut config = context.config.clone();
    config.tape = Some("demo".to_owned());
    let app = App::open(config, context.redactor.clone(), None).await?;
    talk::begin(context, &app)?;

    let mut project: Option<ProjectId> = None;
    let mut end = End::new(None, EndStatus::Answered);
    for wish in [WISH, CHANGE] {
        if !context.json {
            words::say(&format!("\n> {wish}"));
        }
        end = talk::tell(context, &app, project.clone(), wish.to_owned(), true).await?;
        if end.status != EndStatus::Deployed {
            return Ok(end.exit_code().max(1));
        }
        project = end.project.as_deref().map(ProjectId::new);
    }
    if let (Some(project), Some(url), false) = (&project, &end.url, context.json) {
        let report = app.desk.status(project).await?;
        let slug = &report.project.slug;
        let merged = report
            .tasks
            .iter()
            .filter(|task| task.status == "merged")
            .count();
        words::say(&format!(
            "\ndeployed {}/ from the demo tape: {} releases, the change included ({merged} tasks merged in the last job)",
            url.trim_end_matches('/'),
            report.deployments.len(),
        ));
        let program = std::env::args()
            .next()
            .unwrap_or_else(|| "artel".to_owned());
        words::say(&format!(
            "look at it with: {program} status {slug}, or {program} clone {slug}"
        ));
        words::say(&format!("stop it with: {program} stop {slug}"));
    }
    Ok(end.exit_code())
}
