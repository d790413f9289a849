//! A proxy before a PostgreSQL server, on loopback. It counts the messages of the protocol, and cuts a connection before the
//! n-th of one direction: what came before it was delivered, it and what comes after it is lost. Or it lets the connection hang
//! there: nothing is delivered any more, in either direction, and nobody is told. Or it keeps answers back for a while: those to
//! the beginnings of transactions.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use sqlx::PgConnection;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// What is left to be let through before the cut.
#[derive(Clone, Copy, Debug)]
struct Plan {
    direction: Direction,
    left: u64,
    hang: bool,
}

enum Fate {
    Passes,
    Cut,
    Hangs,
}

#[derive(Default)]
struct State {
    plan: Option<Plan>,
    /// The server's processes whose connections were cut, or have ended.
    gone: BTreeSet<i32>,
    /// Answers to `begin` are kept back.
    holds: bool,
    /// How many.
    held: usize,
    /// How often what was kept back has been delivered.
    resumed: u64,
    /// How many statements the server was asked to carry out.
    statements: u64,
}

/// Cut is what is dropped, too.
pub struct Proxy {
    state: Arc<Mutex<State>>,
    resumed: Arc<Notify>,
    port: u16,
    server: Server,
    stop: CancellationToken,
}

#[derive(Clone)]
struct Server {
    host: String,
    port: u16,
}

impl Proxy {
    /// Stands before the server of a URL such as `postgres://user@host:port/database?options`.
    pub async fn before(url: &str) -> Self {
        let address = address(url);
        let (host, port) = address.rsplit_once(':').unwrap_or((address, "5432"));
        let server = Server {
            host: host.to_owned(),
            port: port.parse().expect("a port"),
        };
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listens");
        let proxy = Self {
            state: Arc::default(),
            resumed: Arc::default(),
            port: listener.local_addr().expect("an address").port(),
            server: server.clone(),
            stop: CancellationToken::new(),
        };
        tokio::spawn({
            let (state, stop) = (proxy.state.clone(), proxy.stop.clone());
            let resumed = proxy.resumed.clone();
            stop.clone()
                .run_until_cancelled_owned(accept(listener, server, state, resumed, stop))
        });
        proxy
    }

    /// The URL, by way of the proxy, unencrypted.
    pub fn url(&self, url: &str) -> String {
        let direct = address(url);
        assert!(
            direct.starts_with(&self.server.host) && direct.contains(&self.server.port.to_string())
        );
        let joint = if url.contains('?') { '&' } else { '?' };
        let url = url.replacen(direct, &format!("127.0.0.1:{}", self.port), 1);
        format!("{url}{joint}sslmode=disable")
    }

    /// From now on `n - 1` messages of a direction go through, over all connections; before the next one, its connection is cut.
    pub fn cut_before(&self, direction: Direction, n: u64) {
        self.plan(direction, n, false);
    }

    /// The same, but the connection hangs from then on, until the client closes it.
    pub fn hang_before(&self, direction: Direction, n: u64) {
        self.plan(direction, n, true);
    }

    fn plan(&self, direction: Direction, n: u64, hang: bool) {
        self.state.lock().plan = Some(Plan {
            direction,
            left: n - 1,
            hang,
        });
    }

    /// From now on the server's answers to the beginnings of transactions, and to what comes after them on the same
    /// connections, are kept back.
    pub fn hold_beginnings(&self) {
        let mut state = self.state.lock();
        (state.holds, state.held) = (true, 0);
    }

    /// How many have been kept back.
    pub fn held(&self) -> usize {
        self.state.lock().held
    }

    /// Delivers what was kept back, and keeps nothing back any more.
    pub fn resume(&self) {
        {
            let mut state = self.state.lock();
            state.holds = false;
            state.resumed += 1;
        }
        self.resumed.notify_waiters();
    }

    /// Keeps nothing back any more, but what was kept back stays where it is.
    pub fn forget_held(&self) {
        self.state.lock().holds = false;
    }

    /// How many statements the server was asked to carry out so far, with those that only begin or end a transaction. Questions
    /// whether a connection is well are not counted: they depend on how long it was idle.
    pub fn statements(&self) -> u64 {
        self.state.lock().statements
    }

    /// Cuts nothing any more. Returns whether a connection was cut, or hangs.
    pub fn relent(&self) -> bool {
        self.state.lock().plan.take().is_none()
    }

    /// Waits until the server has noticed all cuts: until then it may still be carrying out what came before them.
    pub async fn settled(&self, side: &mut PgConnection) {
        let gone: Vec<i32> = std::mem::take(&mut self.state.lock().gone)
            .into_iter()
            .collect();
        for _ in 0..5000 {
            let left: i64 =
                sqlx::query_scalar("select count(*) from pg_stat_activity where pid = any ($1)")
                    .bind(&gone)
                    .fetch_one(&mut *side)
                    .await
                    .expect("counts");
            if left == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        panic!("the server does not let go of a connection that was cut");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The host and port of a URL.
fn address(url: &str) -> &str {
    let rest = url.split_once("://").expect("a URL").1;
    let host = rest.split_once('@').map_or(rest, |(_, host)| host);
    host.split(['/', '?']).next().expect("a host")
}

async fn accept(
    listener: TcpListener,
    server: Server,
    state: Arc<Mutex<State>>,
    resumed: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            return;
        };
        let Ok(server) = TcpStream::connect((server.host.as_str(), server.port)).await else {
            continue;
        };
        while connections.try_join_next().is_some() {}
        connections.spawn(carry(
            client,
            server,
            state.clone(),
            resumed.clone(),
            stop.child_token(),
        ));
    }
}

async fn carry(
    client: TcpStream,
    server: TcpStream,
    state: Arc<Mutex<State>>,
    resumed: Arc<Notify>,
    cut: CancellationToken,
) {
    client.set_nodelay(true).expect("is set");
    server.set_nodelay(true).expect("is set");
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let process = Arc::new(Mutex::new(None));
    let hangs = Arc::new(AtomicBool::new(false));
    let holds = Arc::new(AtomicU64::new(0));
    let pump = |direction, from, to| {
        let pump = Pump {
            direction,
            from,
            to,
            // The first message of a client has no type.
            typed: direction == Direction::ToClient,
            state: state.clone(),
            process: process.clone(),
            hangs: hangs.clone(),
            holds: holds.clone(),
            resumed: resumed.clone(),
        };
        pump.run(cut.clone())
    };
    tokio::join!(
        pump(Direction::ToServer, from_client, to_server),
        pump(Direction::ToClient, from_server, to_client),
    );
    let process: Option<i32> = *process.lock();
    state.lock().gone.extend(process);
}

/// One direction of a connection. When it ends, so does the other.
struct Pump {
    direction: Direction,
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    typed: bool,
    state: Arc<Mutex<State>>,
    process: Arc<Mutex<Option<i32>>>,
    /// Nothing is delivered any more.
    hangs: Arc<AtomicBool>,
    /// What the server says is kept back until what was kept back has been delivered so often.
    holds: Arc<AtomicU64>,
    resumed: Arc<Notify>,
}

impl Pump {
    async fn run(mut self, cut: CancellationToken) {
        let _ended = cut.clone().drop_guard();
        let mut bytes = Vec::new();
        loop {
            let mut sent = 0;
            while let Some(length) = self.message(&bytes[sent..]) {
                let message = &bytes[sent..sent + length];
                self.note_process(message);
                self.note_beginning(message);
                self.note_statement(message);
                if self.direction == Direction::ToClient {
                    tokio::select! {
                        () = self.let_go() => {}
                        () = cut.cancelled() => return,
                    }
                }
                match self.fate() {
                    Fate::Passes => {}
                    Fate::Cut => return,
                    Fate::Hangs => return self.swallow(cut).await,
                }
                self.typed = true;
                if self.to.write_all(message).await.is_err() {
                    return;
                }
                sent += length;
            }
            bytes.drain(..sent);
            let read = tokio::select! {
                read = self.from.read_buf(&mut bytes) => read,
                () = cut.cancelled() => return,
            };
            if !matches!(read, Ok(1..)) {
                return;
            }
        }
    }

    /// The length of the first message, if all of it is there.
    fn message(&self, bytes: &[u8]) -> Option<usize> {
        let kind = usize::from(self.typed);
        let length = bytes.get(kind..kind + 4)?.try_into().ok()?;
        let length = kind + usize::try_from(u32::from_be_bytes(length)).ok()?;
        (bytes.len() >= length).then_some(length)
    }

    /// The server says once which of its processes it is.
    fn note_process(&self, message: &[u8]) {
        if self.direction == Direction::ToClient
            && message.first() == Some(&b'K')
            && let Some(Ok(bytes)) = message.get(5..9).map(<[u8; 4]>::try_from)
        {
            *self.process.lock() = Some(i32::from_be_bytes(bytes));
        }
    }

    /// A transaction is begun in a simple query.
    fn note_beginning(&self, message: &[u8]) {
        if self.direction == Direction::ToServer
            && message.first() == Some(&b'Q')
            && message
                .get(5..)
                .is_some_and(|text| text.starts_with(b"begin"))
        {
            let mut state = self.state.lock();
            if state.holds {
                self.holds.store(state.resumed + 1, Ordering::SeqCst);
                state.held += 1;
            }
        }
    }

    /// A prepared statement is executed, or a simple query is none that only looks.
    fn note_statement(&self, message: &[u8]) {
        if self.direction == Direction::ToServer
            && match message.first() {
                Some(b'E') => true,
                Some(b'Q') => !message[5..].starts_with(b"select"),
                _ => false,
            }
        {
            self.state.lock().statements += 1;
        }
    }

    /// Comes back when nothing of this connection is kept back (any more).
    async fn let_go(&self) {
        loop {
            let resumed = self.resumed.notified();
            tokio::pin!(resumed);
            resumed.as_mut().enable();
            if self.holds.load(Ordering::SeqCst) <= self.state.lock().resumed {
                return;
            }
            resumed.await;
        }
    }

    /// Reads what is sent, until nobody sends any more. The server is not told that the client has gone before it has.
    async fn swallow(&mut self, cut: CancellationToken) {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let read = tokio::select! {
                read = self.from.read_buf(&mut bytes) => read,
                () = cut.cancelled() => return,
            };
            if !matches!(read, Ok(1..)) {
                return;
            }
        }
    }

    fn fate(&self) -> Fate {
        if self.hangs.load(Ordering::SeqCst) {
            return Fate::Hangs;
        }
        let mut state = self.state.lock();
        match &mut state.plan {
            Some(plan) if plan.direction == self.direction => {
                if plan.left > 0 {
                    plan.left -= 1;
                    return Fate::Passes;
                }
                let hang = plan.hang;
                state.plan = None;
                // Known as cut before anybody can ask: the rest of the connection ends a little later.
                state.gone.extend(*self.process.lock());
                if hang {
                    self.hangs.store(true, Ordering::SeqCst);
                    Fate::Hangs
                } else {
                    Fate::Cut
                }
            }
            _ => Fate::Passes,
        }
    }
}
