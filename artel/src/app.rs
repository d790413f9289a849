//! Puts the program together: the one place where everybody meets.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use graph::checkpoint::Checkpointer;
use graph::{Engine, PostgresCheckpointer, SqliteCheckpointer};
use models::{BudgetLimits, Player, Provider, Recorder, Tape};
use nodes::{Crew, Policy};
use ports::{Ledger, Models, WorkerModels};
use sandbox::{Sandbox, Unavailable, Unconfined};
use secrets::{Identity, IdentitySource, Redactor, Vault};
use store::{Location, Ports, Store};
use tokio::sync::Notify;

use crate::books::Books;
use crate::bus::Bus;
use crate::config::{self, Config, Mode};
use crate::desk::Desk;
use crate::errands::ErrandDesk;
use crate::health::Needs;
use crate::home::Home;
use crate::spending::{Elsewhere, NO_BUDGET, Tally};

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
    /// How long the crew waits for a worker.
    pub worker_patience: Duration,
    /// The tape that answers, if one does.
    pub tape: Option<String>,
    /// How commands are confined.
    pub sandbox: Sandbox,
    /// Why they are not, when they run all the same.
    pub unconfined: Option<Unavailable>,
    /// This program's file.
    pub program: PathBuf,
    /// Rung when projections moved on.
    pub moved: Arc<Notify>,
    crew: Arc<Crew>,
    shipped: bool,
    unclear: Option<String>,
}

/// Left in the data folder as soon as work begins there whose answers do not ship with the program.
const FOREIGN: &str = "foreign-code";
/// How long an endpoint may take to list its models.
const LISTING: Duration = Duration::from_secs(5);
/// What an endpoint is asked for that lists no models: those that have one take any name.
const ANY_MODEL: &str = "default";
/// The most models that are named in a sentence.
const NAMED: usize = 10;

fn model_config(config: &Config, redactor: &Redactor) -> anyhow::Result<models::Config> {
    let mut models: models::Config = config.table("models")?;
    models.overlay_env(|name| match name {
        "OPENAI_BASE_URL" => config.openai_base_url.clone(),
        "OPENAI_API_KEY" => config
            .openai_api_key
            .as_ref()
            .map(|key| key.expose().to_owned()),
        "ARTEL_MODEL" => config.model.clone(),
        "ANTHROPIC_BASE_URL" => config.anthropic_base_url.clone(),
        "ANTHROPIC_API_KEY" => config
            .anthropic_api_key
            .as_ref()
            .map(|key| key.expose().to_owned()),
        "ANTHROPIC_MODEL" => config.anthropic_model.clone(),
        _ => None,
    });
    models.resolve_keys(|name| {
        let key = std::env::var(name).ok()?;
        redactor.add(name, &ports::Plaintext::new(key.clone()));
        Some(key)
    })?;
    Ok(models)
}

/// The model of an endpoint for which none is named: the only one that it has. Otherwise a name that keeps the program going,
/// and what to say before anybody is asked.
pub async fn only_model(base_url: &str, key: Option<&models::ApiKey>) -> (String, Option<String>) {
    match models::offered_models(base_url, key, LISTING).await {
        Some(mut offered) if offered.len() == 1 => (offered.remove(0), None),
        Some(offered) if offered.len() > 1 => {
            let more = if offered.len() > NAMED { ", …" } else { "" };
            let names = offered[..offered.len().min(NAMED)].join(", ");
            let unclear = format!(
                "ARTEL_MODEL is not set, and {base_url} has {} models: set it to one of {names}{more}",
                offered.len()
            );
            (ANY_MODEL.to_owned(), Some(unclear))
        }
        _ => (ANY_MODEL.to_owned(), None),
    }
}

/// What answers when a model is asked, before it is known who pays.
pub struct Minds {
    models: models::Config,
    tape: Option<Tape>,
    /// Whether only answers that ship with the program can come.
    pub shipped: bool,
    /// Why nobody can be asked, when it is not known which model to ask.
    pub unclear: Option<String>,
}

impl Minds {
    /// Reads the tape or the models of the configuration.
    pub async fn of(config: &Config, redactor: &Redactor) -> anyhow::Result<Self> {
        let mut models = model_config(config, redactor)?;
        let mut unclear = None;
        // An endpoint for workers alone, such as Anthropic's, gives the crew nobody to ask.
        let has_endpoint = models
            .endpoints
            .values()
            .any(|endpoint| endpoint.speaks(models::Speaks::Chat));
        if config.tape.is_none() && !models.is_complete() && has_endpoint {
            if let (None, Some(endpoint)) = (&models.model, models.endpoints.get("default")) {
                let (model, reason) =
                    only_model(&endpoint.base_url, endpoint.api_key.as_ref()).await;
                models.model = Some(model);
                unclear = reason;
            } else {
                unclear = Some(
                    "artel.toml has endpoints but not a model for every role: name one as `model` in [models], or in each of its roles"
                        .to_owned(),
                );
            }
        }
        let tape = match config.tape.as_deref() {
            Some("demo") => Some(Tape::demo()?),
            Some(file) => Some(Tape::load(Path::new(file))?),
            None if !models.is_complete() => Some(Tape::demo()?),
            None => None,
        };
        if tape.is_none() {
            models.validate()?;
        }
        Ok(Self {
            shipped: config.tape.as_deref().is_none_or(|tape| tape == "demo") && tape.is_some(),
            models,
            tape,
            unclear,
        })
    }

    /// The name under which the ledger has the workers' model, and whether its price is known. `named`: what the agent asks for.
    fn workers_model(&self, named: Option<&str>) -> (String, bool) {
        if let Some(tape) = &self.tape {
            return (format!("tape:{}", tape.name()), false);
        }
        let chain = self.models.chain(ports::Role::Developer);
        let first = chain.first().map(|choice| choice.parts().1);
        let model = named.or(first).unwrap_or("unknown");
        (model.to_owned(), self.models.prices.contains_key(model))
    }

    /// Those who answer, paid from this ledger within these limits.
    fn paid_by(
        &self,
        ledger: Arc<dyn Ledger>,
        budget: BudgetLimits,
    ) -> anyhow::Result<(Arc<dyn Models>, Arc<dyn WorkerModels>)> {
        if let Some(tape) = &self.tape {
            let player = Arc::new(Player::new(tape.clone(), ledger, budget));
            return Ok((player.clone(), player));
        }
        let models = models::Config {
            budget,
            ..self.models.clone()
        };
        let provider = Arc::new(Provider::new(&models, ledger)?);
        Ok((provider.clone(), provider))
    }

    /// Models for workers in a process without a database: held to the limits of jobs by the broker, and booked by the crew.
    pub fn for_workers(&self) -> anyhow::Result<Arc<dyn WorkerModels>> {
        Ok(self.paid_by(Arc::new(Elsewhere), NO_BUDGET)?.1)
    }
}

/// Writes every answer onto a tape as well, if there is one to write.
fn recorded(
    answering: (Arc<dyn Models>, Arc<dyn WorkerModels>),
    record: Option<&Path>,
    redactor: &Redactor,
) -> anyhow::Result<(Arc<dyn Models>, Arc<dyn WorkerModels>)> {
    let Some(file) = record else {
        return Ok(answering);
    };
    let redactor = redactor.clone();
    let redact: models::Redact = Arc::new(move |text: &str| redactor.redact(text).into_owned());
    let recorder = Arc::new(Recorder::new(answering.0, answering.1, file, redact)?);
    Ok((recorder.clone(), recorder))
}

/// How commands are confined here. Without bubblewrap only what ships with the program may run, on a data folder that has seen
/// nothing else; otherwise nothing runs.
pub fn confinement(shipped: bool, home: &Home) -> (Sandbox, Option<Unavailable>) {
    match Sandbox::detect() {
        Ok(sandbox) => (sandbox, None),
        Err(reason) if shipped && !home.join(FOREIGN).exists() => {
            (Sandbox::unconfined(Unconfined::ShippedTape), Some(reason))
        }
        Err(reason) => (Sandbox::missing(reason), None),
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
        if config.redis_url.is_some() && config.database_url.is_none() {
            return Err(config::Error::Missing(
                "REDIS_URL is set and DATABASE_URL is not: workers in other processes need a PostgreSQL database beside them; name \
                 one in DATABASE_URL, or take REDIS_URL away"
                    .to_owned(),
            )
            .into());
        }
        let location = match &config.database_url {
            Some(url) => Location::Postgres(url.expose().to_owned()),
            None => Location::Sqlite(home.join("artel.db")),
        };
        let store = Store::open(&location).await?;
        // SQLite lies in the folder; a server can be named from anywhere.
        if store.pg_pool().is_some() {
            anyhow::ensure!(
                store.belongs_to(&home.id()?).await?,
                "the database {location} belongs to another data folder, where its repositories and releases are: set ARTEL_HOME \
                 to that one, or DATABASE_URL to a database of its own"
            );
        }
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

        let minds = Minds::of(&config, &redactor).await?;
        let (crew, mut workers) = minds.paid_by(Arc::new(books.clone()), minds.models.budget)?;
        if config.redis_url.is_some() {
            // Whichever spawner takes a job, this one included, its costs are booked in one way.
            workers = minds.for_workers()?;
        }
        let (models, worker_models) = recorded((crew, workers), record, &redactor)?;
        let (shipped, unclear) = (minds.shipped, minds.unclear.clone());
        let tape = models.tape();
        let (sandbox, unconfined) = confinement(shipped && config.mode != Mode::Full, &home);
        let program = own_program()?;
        let words = |name: &str| vec!["internal".to_owned(), name.to_owned()];

        let policy = policy(&config, &redactor)?;
        let worker_patience =
            Duration::from_secs(policy.limits.wall_s.saturating_add(policy.worker_margin_s));
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
        let (model, priced) = minds.workers_model(policy.agent.model.as_deref());
        let tally = Tally::new(
            books.clone(),
            store.clone(),
            &model,
            priced,
            minds.models.budget,
        );
        let bus = Bus::new(config.redis_url.clone(), tally);
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
            worker_patience,
            tape,
            sandbox,
            unconfined,
            program,
            moved: Arc::default(),
            crew,
            shipped,
            unclear,
        })
    }

    /// Says what keeps work from being done here, before anything is taken on. From then on the data folder is known to hold
    /// code from elsewhere, unless all answers ship with the program.
    pub fn ready_to_work(&self) -> anyhow::Result<()> {
        confined(&self.sandbox)?;
        self.ready_to_ask()?;
        if !self.shipped {
            mark_foreign(&self.home)?;
        }
        Ok(())
    }

    /// Says what keeps the crew from asking a model.
    pub fn ready_to_ask(&self) -> anyhow::Result<()> {
        match &self.unclear {
            Some(unclear) => Err(config::Error::Missing(unclear.clone()).into()),
            None => Ok(()),
        }
    }

    /// What this process needs to be healthy. The bus counts once it is open.
    pub fn needs(&self) -> Needs {
        Needs {
            home: self.home.clone(),
            journal: Some(self.books.journal().clone()),
            transport: self.bus.transport(),
        }
    }

    /// Whether other processes may share the work on this data folder.
    pub fn is_shared(&self) -> bool {
        self.config.redis_url.is_some()
    }

    /// The crew's graphs, drawn.
    pub fn picture(&self) -> anyhow::Result<nodes::Picture> {
        Ok(nodes::picture(&self.crew)?)
    }
}

/// This program's own file.
pub fn own_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("this program's own file cannot be found")
}

/// Says why code from a model cannot run here, if it cannot.
pub fn confined(sandbox: &Sandbox) -> anyhow::Result<()> {
    sandbox.check().context(
        "code from a model only runs in a sandbox, and there is none; without one, only the demo tape runs, on a data folder \
         that has seen nothing else (`artel demo`)",
    )
}

/// From now on the data folder is known to hold code from elsewhere.
pub fn mark_foreign(home: &Home) -> anyhow::Result<()> {
    let file = home.join(FOREIGN);
    std::fs::write(&file, "Code in this folder only runs in a sandbox.\n")
        .with_context(|| format!("{} cannot be written", file.display()))
}

fn policy(config: &Config, redactor: &Redactor) -> anyhow::Result<Policy> {
    let mut policy = config.policy()?;
    policy.agent.adapter.clone_from(&config.agent);
    policy.agent.command.clone_from(&config.agent_command);
    // These shape their questions by the model's name; the job's model is asked whatever they say.
    let speaks = match config.agent.as_str() {
        "claude-code" => models::Speaks::Messages,
        "codex" => models::Speaks::Responses,
        _ => return Ok(policy),
    };
    if policy.agent.model.is_none() {
        policy.agent.model = model_config(config, redactor)?.worker_model(speaks);
    }
    Ok(policy)
}
