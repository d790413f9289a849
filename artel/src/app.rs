//! Puts the program together: the one place where everybody meets.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use graph::checkpoint::Checkpointer;
use graph::{Engine, PostgresCheckpointer, SqliteCheckpointer};
use models::{Player, Provider, Recorder, Tape};
use nodes::{Crew, Policy};
use ports::{Models, WorkerModels};
use sandbox::{Sandbox, Unconfined};
use secrets::{Identity, IdentitySource, Redactor, Vault};
use store::{Location, Ports, Store};
use tokio::sync::Notify;

use crate::books::Books;
use crate::bus::Bus;
use crate::config::Config;
use crate::desk::Desk;
use crate::errands::ErrandDesk;
use crate::home::Home;

/// Everything, opened. Nothing runs yet: see [`crate::work`].
#[derive(Clone)]
pub struct App {
    /// The configuration.
    pub config: Config,
    /// The data folder.
    pub home: Home,
    /// The product's tables.
    pub store: Store,
    /// The engine with the crew's graphs.
    pub engine: Engine,
    /// The journal and its projections.
    pub books: Books,
    /// Secrets.
    pub vault: Vault,
    /// What every front end asks.
    pub desk: Arc<Desk>,
    /// Repositories.
    pub forge: Arc<forge::LocalForge>,
    /// Releases.
    pub deployer: deploy::LocalDeployer,
    /// The way to the workers.
    pub bus: Bus,
    /// Checks and deploys.
    pub errands: ErrandDesk,
    /// Models for workers.
    pub worker_models: Arc<dyn WorkerModels>,
    /// The tape that answers, if one does.
    pub tape: Option<String>,
    /// How commands are confined.
    pub sandbox: Sandbox,
    /// This program's file.
    pub program: PathBuf,
    /// Rung when projections moved on.
    pub moved: Arc<Notify>,
    crew: Arc<Crew>,
}

/// The models, for the crew and for workers.
struct Answering {
    crew: Arc<dyn Models>,
    workers: Arc<dyn WorkerModels>,
    /// Whether only answers that ship with the program can come.
    shipped: bool,
}

fn model_config(config: &Config) -> anyhow::Result<models::Config> {
    let mut models: models::Config = config.table("models")?;
    models.overlay_env(|name| match name {
        "OPENAI_BASE_URL" => config.openai_base_url.clone(),
        "OPENAI_API_KEY" => config
            .openai_api_key
            .as_ref()
            .map(|key| key.expose().to_owned()),
        "ARTEL_MODEL" => config.model.clone(),
        _ => None,
    });
    models.resolve_keys(|name| std::env::var(name).ok())?;
    Ok(models)
}

fn answering(
    config: &Config,
    record: Option<&Path>,
    books: &Books,
    redactor: &Redactor,
) -> anyhow::Result<Answering> {
    let ledger = Arc::new(books.clone());
    let models = model_config(config)?;
    let tape = match config.tape.as_deref() {
        Some("demo") => Some(Tape::demo()?),
        Some(file) => Some(Tape::load(Path::new(file))?),
        None if !models.is_complete() => Some(Tape::demo()?),
        None => None,
    };
    let shipped = config.tape.as_deref().is_none_or(|tape| tape == "demo") && tape.is_some();
    let (crew, workers): (Arc<dyn Models>, Arc<dyn WorkerModels>) = if let Some(tape) = tape {
        let player = Arc::new(Player::new(tape, ledger, models.budget));
        (player.clone(), player)
    } else {
        models.validate()?;
        let provider = Arc::new(Provider::new(&models, ledger)?);
        (provider.clone(), provider)
    };
    let Some(file) = record else {
        return Ok(Answering {
            crew,
            workers,
            shipped,
        });
    };
    let redactor = redactor.clone();
    let redact: models::Redact = Arc::new(move |text: &str| redactor.redact(text).into_owned());
    let recorder = Arc::new(Recorder::new(crew, workers, file, redact)?);
    Ok(Answering {
        crew: recorder.clone(),
        workers: recorder,
        shipped,
    })
}

/// How commands are confined here; without bubblewrap, only what ships with the program may run.
fn confinement(shipped: bool) -> anyhow::Result<Sandbox> {
    match Sandbox::detect() {
        Ok(sandbox) => Ok(sandbox),
        Err(reason) if shipped => {
            tracing::warn!(%reason, "commands run UNCONFINED: only the tape that ships with the program may run so");
            Ok(Sandbox::unconfined(Unconfined::ShippedTape))
        }
        Err(reason) => Err(anyhow::anyhow!(reason)).context(
            "code from a model only runs in a sandbox, and there is none; without one, only the demo tape runs (ARTEL_TAPE=demo)",
        ),
    }
}

impl App {
    /// Opens everything. `record`: a tape to write every answer into.
    pub async fn open(
        config: Config,
        redactor: Redactor,
        record: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let home = Home::open(&config.home)?;
        let location = match &config.database_url {
            Some(url) => Location::Postgres(url.expose().to_owned()),
            None => Location::Sqlite(home.join("artel.db")),
        };
        let store = Store::open(&location).await?;
        let (checkpointer, database): (Arc<dyn Checkpointer>, _) =
            match (store.sqlite_pool(), store.pg_pool()) {
                (Some(_), _) => {
                    let checkpointer = SqliteCheckpointer::open(home.join("artel.db")).await?;
                    (
                        Arc::new(checkpointer),
                        store.sqlite_pool().cloned().map(secrets::Database::Sqlite),
                    )
                }
                (None, pool) => {
                    let pool = pool.context("the store has neither database")?.clone();
                    (
                        Arc::new(PostgresCheckpointer::from_pool(pool.clone())),
                        Some(secrets::Database::Postgres(pool)),
                    )
                }
            };
        let books = Books::open(checkpointer.clone(), &store).await?;

        let source = IdentitySource::choose(
            home.path(),
            config
                .age_key
                .as_ref()
                .map(|key| ports::Plaintext::new(key.expose().to_owned())),
            config.age_key_file.clone(),
        );
        let vault = Vault::open(
            database.context("the store has no database")?,
            Identity::load(&source)?,
            redactor.clone(),
            Arc::new(books.clone()),
        )
        .await?;

        let Answering {
            crew: models,
            workers: worker_models,
            shipped,
        } = answering(&config, record, &books, &redactor)?;
        let tape = models.tape();
        let sandbox = confinement(shipped)?;
        let program = std::env::current_exe().context("this program's own file cannot be found")?;
        let words = |name: &str| vec!["internal".to_owned(), name.to_owned()];

        let policy = policy(&config)?;
        let mut hosting = forge::Options::new(home.join("repos"), Some(sandbox.clone()));
        hosting.check_limits.wall_s = Some(policy.checks_wall_s);
        let forge = Arc::new(forge::LocalForge::with(hosting));
        let deployer = deploy::LocalDeployer::new(deploy::Options {
            home: home.path().to_owned(),
            sandbox: sandbox.clone(),
            program: program.clone(),
            supervise_args: words("supervise"),
            launch_args: words("launch"),
            secrets: Arc::new(vault.clone()),
            ready_s: policy.service_ready_s,
        });
        let bus = Bus::default();
        let errands = ErrandDesk::new(store.clone());
        let crew = Crew {
            models,
            forge: forge.clone(),
            workers: Arc::new(bus.clone()),
            vault: Arc::new(vault.clone()),
            allocations: Arc::new(Ports::new(&store, config.ports.0..=config.ports.1)),
            errands: Arc::new(errands.clone()),
            record: Arc::new(store.clone()),
            ledger: Arc::new(books.clone()),
            policy,
            traceparent: Arc::new(telemetry::current_traceparent),
        };
        let (conversation, job, task) = nodes::graphs(&crew)?;
        let crew = Arc::new(crew);
        let engine = Engine::builder(checkpointer)
            .graph(conversation)
            .graph(job)
            .graph(task)
            .observer(crate::traces::observer(crate::crash::observer()))
            .build()
            .await?;

        let desk = Arc::new(Desk::new(
            engine.clone(),
            store.clone(),
            books.clone(),
            vault.clone(),
            deployer.clone(),
        ));
        Ok(Self {
            config,
            home,
            store,
            engine,
            books,
            vault,
            desk,
            forge,
            deployer,
            bus,
            errands,
            worker_models,
            tape,
            sandbox,
            program,
            moved: Arc::default(),
            crew,
        })
    }
}

impl App {
    /// The crew's graphs, drawn.
    pub fn picture(&self) -> anyhow::Result<nodes::Picture> {
        Ok(nodes::picture(&self.crew)?)
    }
}

fn policy(config: &Config) -> anyhow::Result<Policy> {
    let mut policy = config.policy()?;
    policy.agent.adapter.clone_from(&config.agent);
    policy.agent.command.clone_from(&config.agent_command);
    Ok(policy)
}
