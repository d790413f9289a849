//! Commands that change something at once, without the crew.

use std::io::IsTerminal;
use std::path::PathBuf;

use ports::{Event, FrontDesk, Recorded, ServiceOrder};

use crate::cli::{CloneArgs, MigrateArgs, ProjectCommand, RemoveArgs, SecretsCommand};
use crate::follow::Until;
use crate::words::{self, print_json};

use super::{Context, me, project_of, talk, terminal};

/// `artel rollback`.
pub(super) async fn rollback(context: &Context, project: &str) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let project = project_of(&app, Some(project)).await?;
    let deployment = app.desk.rollback(&project, &me(), &talk::key()).await?;
    context.say(
        &deployment,
        &format!(
            "release {} is live again at {}",
            deployment.release, deployment.url
        ),
    );
    Ok(0)
}

/// `artel stop`, `start`, `archive`.
pub(super) async fn service(
    context: &Context,
    project: &str,
    order: ServiceOrder,
) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let project = project_of(&app, Some(project)).await?;
    app.desk.service(&project, order, &me()).await?;
    let report = app.desk.status(&project).await?;
    if context.json {
        print_json(&report);
    } else {
        match order {
            ServiceOrder::Stop => words::say(&format!(
                "{} is stopped; start it with: artel start {0}",
                report.project.slug
            )),
            ServiceOrder::Start => words::say(&format!(
                "{} is running at {}",
                report.project.slug,
                report
                    .project
                    .url
                    .as_deref()
                    .unwrap_or("an unknown address")
            )),
            ServiceOrder::Remove => words::say(&format!(
                "{}: service, releases and data are gone; the repository stays",
                report.project.slug
            )),
            ServiceOrder::Archive => words::say(&format!("{} is put away", report.project.slug)),
        }
    }
    Ok(0)
}

/// `artel remove`.
pub(super) async fn remove(context: &Context, args: RemoveArgs) -> anyhow::Result<u8> {
    if !args.yes {
        anyhow::ensure!(
            std::io::stdin().is_terminal(),
            "this deletes the releases and the data of {}: say so with --yes",
            args.project
        );
        let answer = terminal::ask(
            &format!(
                "Delete the releases and the data of {}? (yes/no)",
                args.project
            ),
            Some("no"),
        )?;
        if answer.as_deref() != Some("yes") {
            words::say("nothing was deleted");
            return Ok(1);
        }
    }
    service(context, &args.project, ServiceOrder::Remove).await
}

/// `artel cancel`.
pub(super) async fn cancel(context: &Context, project: &str) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let id = project_of(&app, Some(project)).await?;
    let after = app.books.journal().end().await?;
    anyhow::ensure!(
        app.desk.cancel(&id, &me()).await?,
        "no job of {project} is running"
    );
    talk::finish(context, &app, &id, after, Until::Idle).await?;
    // What was asked for was done.
    Ok(0)
}

/// `artel clone`.
pub(super) async fn clone(context: &Context, args: CloneArgs) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let project = project_of(&app, Some(&args.project)).await?;
    let dir = match args.dir {
        Some(dir) => dir,
        None => PathBuf::from(app.desk.status(&project).await?.project.slug),
    };
    let dir = std::env::current_dir()?.join(dir);
    forge::LocalForge::clone_into(&app.forge, &project, &dir).await?;
    context.say(
        &serde_json::json!({"project": project, "dir": dir}),
        &format!("cloned into {}", dir.display()),
    );
    Ok(0)
}

/// `artel project set`.
pub(super) async fn project(context: &Context, command: ProjectCommand) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let ProjectCommand::Set {
        project,
        field,
        value,
    } = command;
    let id = project_of(&app, Some(&project)).await?;
    let event = if field == "repo" {
        Event::RepositoryCreated { location: value }
    } else {
        let status = match value.as_str() {
            "deployed" => "started",
            status @ ("stopped" | "archived") => status,
            other => anyhow::bail!("{other:?} cannot be set: deployed, stopped or archived"),
        };
        Event::ServiceChanged {
            status: status.to_owned(),
            by: me().to_string(),
        }
    };
    app.books
        .write(
            &format!("set:{}", uuid::Uuid::now_v7()),
            &Recorded::new(id.clone(), event),
        )
        .await?;
    let report = app.desk.status(&id).await?;
    if context.json {
        print_json(&report);
    } else {
        words::say(&format!(
            "{}: {}, repository {}",
            report.project.slug,
            report.project.status,
            report.project.repository.as_deref().unwrap_or("-")
        ));
    }
    Ok(0)
}

/// `artel secrets`.
pub(super) async fn secrets(context: &Context, command: SecretsCommand) -> anyhow::Result<u8> {
    let app = context.app().await?;
    match command {
        SecretsCommand::Set { project, name } => {
            let project = project_of(&app, Some(&project)).await?;
            // Said before the value is asked for.
            secrets::check_name(&name)?;
            let value = terminal::ask_secret(&format!("Value of {name}"))?;
            app.desk.set_secret(&project, &name, value, &me()).await?;
            let handle = format!("secret://project/{project}/{name}");
            context.say(
                &serde_json::json!({"name": name, "handle": handle}),
                &format!("{name} is stored, encrypted; the crew sees only {handle}"),
            );
        }
        SecretsCommand::List { project } => {
            let project = project_of(&app, Some(&project)).await?;
            for name in app.vault.names(&project).await? {
                if context.json {
                    print_json(
                        &serde_json::json!({"name": name, "handle": format!("secret://project/{project}/{name}")}),
                    );
                } else {
                    words::say(&name);
                }
            }
        }
        SecretsCommand::Remove { project, name } => {
            let project = project_of(&app, Some(&project)).await?;
            anyhow::ensure!(
                app.vault.delete(&project, &name).await?,
                "there is no secret {name}"
            );
            context.say(
                &serde_json::json!({"name": name, "handle": null}),
                &format!("{name} is deleted; a running service has it until it is deployed again"),
            );
        }
    }
    Ok(0)
}

/// `artel migrate`.
pub(super) async fn migrate(context: &Context, args: &MigrateArgs) -> anyhow::Result<u8> {
    // Opening does it; what it cannot do is an error that says why.
    let app = context.app().await?;
    if args.rebuild_projections {
        app.books.rebuild().await?;
    }
    app.books.catch_up().await?;
    let rebuilt = if args.rebuild_projections {
        "; the projections were made again from the journal"
    } else {
        ""
    };
    context.say(
        &serde_json::json!({"database": "up to date", "rebuilt": args.rebuild_projections}),
        &format!("the database is up to date{rebuilt}"),
    );
    Ok(0)
}

/// `artel service install`.
pub(super) fn install_service(context: &Context) -> anyhow::Result<u8> {
    let unit = deploy::unit::Unit {
        program: std::env::current_exe()?,
        home: context.config.home.clone(),
        path: std::env::var("PATH").unwrap_or_default(),
    };
    let configuration = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")))
        .ok_or_else(|| {
            anyhow::anyhow!("neither XDG_CONFIG_HOME nor HOME is set: nobody knows where units go")
        })?;
    let installed = unit.install(&configuration)?;
    let mut text = format!("written to {}; now run:", installed.file.display());
    for command in &installed.commands {
        text.push_str("\n  ");
        text.push_str(command);
    }
    context.say(
        &serde_json::json!({"file": installed.file, "commands": installed.commands}),
        &text,
    );
    Ok(0)
}
