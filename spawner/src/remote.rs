//! A task's repository that is elsewhere, over http or https.
//!
//! The spawner keeps a bare mirror of it, which all its tasks share ([`Mirror`]). Workspaces are made from it and their commits are judged in it exactly as
//! in a repository on this machine; only then is the branch pushed, and what the host has is read back. A credential is minted
//! for each command that reaches the host and is known to that process alone: it is in no argument, no file and no other
//! environment.

use crate::collect::{self, Taken};
use crate::git::{self, Git, Login};
use crate::mirror::{Mirror, Right};
use crate::places::{self, Places};
use crate::reading::Reading;
use crate::tokens::{GitToken, GitTokens, is_local};
use crate::trouble::{Trouble, kind};
use protocol::Repository;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

/// Longest that fetching or pushing may take.
const TRANSFER: Duration = Duration::from_mins(10);
/// How long a mint may take.
const MINT: Duration = Duration::from_secs(30);
/// How often another task may make the mirror anew between our steps.
const OVERTAKEN: usize = 3;

/// How repositories elsewhere are reached.
pub(crate) struct Reach<'a> {
    /// Whence credentials come.
    pub(crate) tokens: &'a dyn GitTokens,
    /// How long a host may take to say what it has, and how long a transfer may stand still.
    pub(crate) patience: Duration,
}

/// One repository elsewhere, and its mirror.
pub(crate) struct Remote<'a> {
    url: Url,
    reach: &'a Reach<'a>,
    mirror: Mirror,
}

impl<'a> Remote<'a> {
    /// Reads the address of a request. Nothing is reached yet.
    pub(crate) fn new(
        clone_url: &str,
        places: &Places,
        reach: &'a Reach<'a>,
    ) -> Result<Self, Trouble> {
        let refused = |why: &str| {
            let shown = clone_url.rsplit('@').next().unwrap_or_default();
            Trouble::failed(
                kind::UNSUPPORTED,
                format!("The repository {shown} cannot be cloned: {why}."),
            )
        };
        let url = Url::parse(clone_url)
            .map_err(|_| refused("an address like https://github.com/owner/name.git is needed"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(refused("only http and https addresses are"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refused(
                "its address carries a credential, which belongs into the spawner's configuration",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(refused("its address has a query or a fragment"));
        }
        let mirror = Mirror::of(&places.mirrors, &url);
        Ok(Self { url, reach, mirror })
    }

    /// The mirror: a bare repository of ours.
    pub(crate) fn mirror(&self) -> &PathBuf {
        &self.mirror.folder
    }

    /// Brings the mirror up to date, sees to it that the base is in it, and keeps it so while it is read.
    pub(crate) async fn bring(&self, repository: &Repository) -> Result<Right, Trouble> {
        self.opened(repository, false).await
    }

    /// The same with a new mirror, because the old one turned out to be broken.
    pub(crate) async fn bring_anew(&self, repository: &Repository) -> Result<Right, Trouble> {
        self.opened(repository, true).await
    }

    async fn opened(&self, repository: &Repository, mut anew: bool) -> Result<Right, Trouble> {
        let folder = self.folder();
        places::private_folder(&folder)
            .map_err(|error| self.trouble("making a mirror of", &error))?;
        // Says within seconds what is wrong with the address, the token or the host, and keeps nobody waiting.
        self.listed(&repository.branch).await?;
        for _ in 0..OVERTAKEN {
            let alone = self.alone().await?;
            self.update(repository, anew).await?;
            drop(alone);
            anew = false;
            // Between the two somebody may have made it anew, and failed.
            let right = self.beside_others().await?;
            if self.has(&repository.base_sha).await {
                return Ok(right);
            }
        }
        Err(self.trouble(
            "keeping a mirror of",
            &io::Error::other("other tasks make it anew again and again"),
        ))
    }

    async fn alone(&self) -> Result<Right, Trouble> {
        let right = self.mirror.alone().await;
        right.map_err(|error| self.trouble("waiting for the mirror of", &error))
    }

    async fn beside_others(&self) -> Result<Right, Trouble> {
        let right = self.mirror.beside_others().await;
        right.map_err(|error| self.trouble("waiting for the mirror of", &error))
    }

    async fn has(&self, commit: &str) -> bool {
        let found = Git::new(&self.mirror.folder).commit(commit).await;
        matches!(found, Ok(Some(_)))
    }

    /// Takes the worker's commits over into the mirror, and pushes them from there.
    pub(crate) async fn deliver(
        &self,
        places: &Places,
        repository: &Repository,
        reading: &Reading,
    ) -> Result<Taken, Trouble> {
        for _ in 0..OVERTAKEN {
            if !self.mirror.exists() {
                drop(self.bring(repository).await?);
            }
            let taken = {
                let _alone = self.alone().await?;
                collect::take_over(places, self.mirror(), repository, reading).await?
            };
            let _right = self.beside_others().await?;
            if self.has(&taken.head_sha).await {
                self.push(&repository.branch, &taken.head_sha).await?;
                return Ok(taken);
            }
        }
        Err(self.trouble(
            "pushing to",
            &io::Error::other("other tasks make its mirror anew again and again"),
        ))
    }

    async fn update(&self, repository: &Repository, anew: bool) -> Result<(), Trouble> {
        if anew || !self.mirror.exists() {
            self.found().await?;
        }
        let everything = "+refs/heads/*:refs/heads/*";
        if let Err(error) = self.fetch(everything).await {
            if meaning(&error.to_string()) != Meaning::Other {
                // It is the host's fault, and the mirror is as good as it was.
                return Err(self.trouble("fetching from", &error));
            }
            // What a killed command left behind may be in the way: once more, into a new one.
            self.found().await?;
            self.fetch(everything)
                .await
                .map_err(|error| self.trouble("fetching from", &error))?;
        }
        let base = &repository.base_sha;
        let mirror = Git::new(&self.mirror.folder);
        let unreadable = |error: git::Error| self.trouble("reading the mirror of", &error);
        if mirror.commit(base).await.map_err(unreadable)?.is_some() {
            return Ok(());
        }
        // It may be on no branch any more; hosts give it all the same if they still have it.
        let asked = self.fetch(base).await;
        if mirror.commit(base).await.map_err(unreadable)?.is_some() {
            return Ok(());
        }
        let evidence = asked.err().map(|error| error.to_string());
        Err(Trouble::failed(
            kind::BASE_MISSING,
            format!(
                "Commit {base} is not in the repository {}; its owner has to push it again, or to begin anew from a commit that is there.",
                self.url
            ),
        )
        .evidence(evidence.unwrap_or_default()))
    }

    async fn found(&self) -> Result<(), Trouble> {
        let failed = |error: &dyn std::error::Error| self.trouble("making a mirror of", error);
        let folder = &self.mirror.folder;
        places::remove_any(folder).map_err(|error| failed(&error))?;
        std::fs::create_dir_all(folder).map_err(|error| failed(&error))?;
        Git::new(folder)
            .text(&[
                "init",
                "--quiet",
                "--bare",
                "--template=",
                "--initial-branch=main",
            ])
            .await
            .map_err(|error| failed(&error))?;
        places::replace_file(folder, "config", git::QUARANTINE_CONFIG)
            .map_err(|error| failed(&error))
    }

    async fn fetch(&self, what: &str) -> Result<(), Failed> {
        let url = self.url.as_str();
        let args = [
            "fetch",
            "--quiet",
            "--no-tags",
            "--prune",
            "--no-write-fetch-head",
            "--no-auto-gc",
            "--no-recurse-submodules",
            "--end-of-options",
            url,
            what,
        ];
        self.run(self.mirror.folder.clone(), &args, TRANSFER)
            .await
            .map(drop)
    }

    /// Pushes the branch's new tip, which is in the mirror and was judged there, and reads back what the host has.
    async fn push(&self, branch: &str, tip: &str) -> Result<(), Trouble> {
        let refspec = format!("{tip}:refs/heads/{branch}");
        let args = [
            "push",
            "--quiet",
            "--no-verify",
            "--no-follow-tags",
            "--no-signed",
            "--recurse-submodules=no",
            "--end-of-options",
            self.url.as_str(),
            &refspec,
        ];
        let pushed = self.run(self.mirror.folder.clone(), &args, TRANSFER).await;
        // Whatever the push said (its answer may have been lost), what counts is what is there.
        let there = self.listed(branch).await;
        match (pushed, there) {
            (_, Ok(Some(there))) if there == tip => Ok(()),
            (Err(Failed::Git(error)), Ok(there)) if is_moved(&error.to_string()) => {
                let there = there.unwrap_or_else(|| "gone".to_owned());
                Err(Trouble::failed(
                    kind::BRANCH_MOVED,
                    format!(
                        "Branch {branch} of {} was changed by somebody else while the worker ran; the next attempt continues from there.",
                        self.url
                    ),
                )
                .evidence(format!("it is at {there}; the worker's tip is {tip}\n{error}")))
            }
            (Err(error), _) => Err(self.trouble("pushing to", &error)),
            (Ok(_), Err(trouble)) => Err(trouble),
            (Ok(_), Ok(there)) => Err(Trouble::failed(
                kind::PUSH_FAILED,
                format!(
                    "Branch {branch} was pushed to {} but is not at {tip} there.",
                    self.url
                ),
            )
            .evidence(there.unwrap_or_else(|| "it is missing".to_owned()))),
        }
    }

    /// The commit that the host has on a branch.
    async fn listed(&self, branch: &str) -> Result<Option<String>, Trouble> {
        let name = format!("refs/heads/{branch}");
        let args = [
            "ls-remote",
            "--quiet",
            "--refs",
            "--end-of-options",
            self.url.as_str(),
            &name,
        ];
        let listed = self
            .run(self.folder(), &args, self.reach.patience)
            .await
            .map_err(|error| self.trouble("asking", &error))?;
        Ok(listed
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .find(|(_, listed)| *listed == name)
            .map(|(sha, _)| sha.to_owned()))
    }

    /// Runs a command that reaches the host, with a credential of its own.
    async fn run(&self, folder: PathBuf, args: &[&str], time: Duration) -> Result<String, Failed> {
        let token = tokio::time::timeout(MINT, self.reach.tokens.mint(&self.url))
            .await
            .map_err(|_| Failed::Unminted(format!("it took more than {} s", MINT.as_secs())))?
            .map_err(|error| {
                if error.retryable {
                    Failed::Unminted(error.to_string())
                } else {
                    Failed::Token(error.to_string())
                }
            })?;
        let login = self.login(token, time)?;
        let said = Git::new(folder).with(login).text(args).await;
        if let Err(error) = &said
            && matches!(
                meaning(&error.to_string()),
                Meaning::Denied | Meaning::Missing
            )
        {
            self.reach.tokens.refused(&self.url);
        }
        said.map_err(Failed::Git)
    }

    /// The folder of all mirrors, in which Git runs when it needs none.
    fn folder(&self) -> PathBuf {
        let parent = self.mirror.folder.parent();
        parent.map(PathBuf::from).unwrap_or_default()
    }

    fn login(&self, token: Option<GitToken>, time: Duration) -> Result<Login, Failed> {
        let local = is_local(&self.url);
        if token.is_some() && self.url.scheme() == "http" && !local {
            return Err(Failed::Token(
                "a token is not sent over http; the repository's address has to begin with https://".to_owned(),
            ));
        }
        let origin = self.url.origin().ascii_serialization();
        let stall = self.reach.patience.as_secs().max(1);
        let mut settings = vec![
            format!("protocol.{}.allow=always", self.url.scheme()),
            // A credential is for this host and goes to no other one.
            "http.followRedirects=false".to_owned(),
            "http.lowSpeedLimit=1".to_owned(),
            format!("http.lowSpeedTime={stall}"),
            // What old histories really have, and what no reader is harmed by.
            "fetch.fsck.zeroPaddedFilemode=ignore".to_owned(),
            "fetch.fsck.badTimezone=ignore".to_owned(),
            "fetch.fsck.missingSpaceBeforeDate=ignore".to_owned(),
        ];
        if token.is_some() {
            settings.push(format!("credential.{origin}.helper={}", git::HELPER));
        }
        Ok(Login {
            settings,
            token,
            time,
            proxied: !local,
        })
    }

    /// What it means that a command did not do what it should, and who can mend it.
    fn trouble(&self, doing: &str, error: &dyn std::error::Error) -> Trouble {
        let said = error.to_string();
        let url = &self.url;
        let (kind, message) = match meaning(&said) {
            Meaning::Token => (
                kind::ACCESS_DENIED,
                format!(
                    "There is no token for the repository {url}; an admin has to look at the spawner's configuration (GITHUB_TOKEN, or GITHUB_APP_ID; the evidence says more)."
                ),
            ),
            Meaning::Denied => (
                kind::ACCESS_DENIED,
                format!(
                    "The repository {url} refuses the spawner; an admin has to set a token that may read and write it (GITHUB_TOKEN), or to give the GitHub App that right."
                ),
            ),
            Meaning::Missing => (
                kind::REPOSITORY_MISSING,
                format!(
                    "The repository {url} is not there, or the spawner's token may not see it; its owner has to look at the address and at who may see it."
                ),
            ),
            Meaning::Down => (
                kind::REMOTE_DOWN,
                format!(
                    "The host of the repository {url} gives no answer; it is tried again, and an admin can look at the way to it."
                ),
            ),
            Meaning::Other if doing == "pushing to" => (
                kind::PUSH_FAILED,
                format!(
                    "The repository {url} did not take the branch; its owner has to look at its rules (the evidence says which)."
                ),
            ),
            Meaning::Other => (
                kind::CLONE_FAILED,
                format!(
                    "The workspace could not be made ready: {doing} the repository {url} failed."
                ),
            ),
        };
        Trouble::failed(kind, message).evidence(said)
    }
}

/// Why a command that reaches the host did not do what it should.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("no token: {0}")]
    Token(String),
    /// The same, and waiting may help.
    #[error("not yet a token: {0}")]
    Unminted(String),
    #[error(transparent)]
    Git(git::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Token,
    Denied,
    Missing,
    Down,
    Other,
}

/// Somebody else pushed meanwhile.
fn is_moved(said: &str) -> bool {
    [
        "non-fast-forward",
        "fetch first",
        "stale info",
        "cannot lock ref",
        "failed to update ref",
    ]
    .iter()
    .any(|words| said.contains(words))
}

/// What Git's words (always English here) mean.
fn meaning(said: &str) -> Meaning {
    let has = |all: &[&str]| all.iter().any(|words| said.contains(words));
    if said.starts_with("no token") {
        Meaning::Token
    } else if said.starts_with("not yet a token") {
        Meaning::Down
    } else if has(&[
        "Authentication failed",
        "could not read Username",
        "could not read Password",
        "returned error: 401",
        "returned error: 403",
        "Permission to",
    ]) {
        Meaning::Denied
    } else if has(&[
        "not found",
        "returned error: 404",
        "returned error: 410",
        "returned error: 301",
        "returned error: 302",
    ]) {
        Meaning::Missing
    } else if has(&[
        "Could not resolve host",
        "Failed to connect",
        "Couldn't connect",
        "Could not connect",
        "Connection refused",
        "Connection reset",
        "Connection timed out",
        "Empty reply from server",
        "Operation too slow",
        "Operation timed out",
        "did not end within",
        "returned error: 429",
        "returned error: 5",
        "early EOF",
        "unexpected disconnect",
        "RPC failed",
        "SSL",
        "certificate",
    ]) {
        Meaning::Down
    } else {
        Meaning::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::NoTokens;

    #[test]
    fn an_address_is_a_plain_one_or_refused_without_its_credential() {
        let places = Places {
            workspace: "/w".into(),
            state: "/w~".into(),
            mirrors: "/m".into(),
            disk: None,
            seat: None,
        };
        let reach = Reach {
            tokens: &NoTokens,
            patience: Duration::from_secs(1),
        };
        assert!(Remote::new("https://github.com/a/b.git", &places, &reach).is_ok());
        for url in [
            "git@github.com:a/b.git",
            "ssh://git@github.com/a/b.git",
            "ext::sh -c id",
            "file:///etc",
            "--upload-pack=id",
            "https://me:canary@github.com/a/b.git",
            "https://canary@github.com/a/b.git",
            "https://github.com/a/b.git?x=1",
        ] {
            let trouble = Remote::new(url, &places, &reach).err().unwrap();
            assert_eq!(trouble.kind, kind::UNSUPPORTED, "{url}");
            assert!(!trouble.message.contains("canary"), "{}", trouble.message);
        }
    }

    #[tokio::test]
    async fn a_token_is_not_sent_over_http_to_another_machine() {
        let places = Places {
            workspace: "/w".into(),
            state: "/w~".into(),
            mirrors: "/m".into(),
            disk: None,
            seat: None,
        };
        let tokens = crate::HostToken::github("http://git.example", "canary".to_owned()).unwrap();
        let reach = Reach {
            tokens: &tokens,
            patience: Duration::from_secs(1),
        };
        let remote = Remote::new("http://git.example/a/b.git", &places, &reach).unwrap();
        let trouble = remote.listed("main").await.unwrap_err();
        assert_eq!(trouble.kind, kind::ACCESS_DENIED);
        assert!(
            trouble.evidence.contains("https://"),
            "{}",
            trouble.evidence
        );
    }

    #[test]
    fn what_git_says_has_a_meaning() {
        for (said, meant) in [
            (
                "fatal: Authentication failed for 'https://h/'",
                Meaning::Denied,
            ),
            (
                "fatal: could not read Username for 'https://h': terminal prompts disabled",
                Meaning::Denied,
            ),
            (
                "fatal: repository 'https://h/x/' not found",
                Meaning::Missing,
            ),
            (
                "fatal: unable to access 'https://h/': Could not resolve host: h",
                Meaning::Down,
            ),
            ("no token: returned error: 503", Meaning::Token),
            ("not yet a token: not found", Meaning::Down),
            ("`git ls-remote` did not end within 60 s", Meaning::Down),
            (
                "error: The requested URL returned error: 503",
                Meaning::Down,
            ),
            ("fatal: bad object", Meaning::Other),
        ] {
            assert_eq!(meaning(said), meant, "{said}");
        }
        assert!(is_moved("! [rejected] x -> y (fetch first)"));
    }
}
