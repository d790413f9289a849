//! GitHub's API as far as an app needs it, on loopback: it checks every proof with the app's public key, and writes down who asked
//! for what.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use hyper::{Method, Request, Response};
use jiff::{SignedDuration, Timestamp};
use rustls::SignatureScheme;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The app's id there.
pub const APP: &str = "4711";
/// Where it is installed for `acme/repository`.
const INSTALLATION: u64 = 815;
/// Where the API is, below the address of the host.
pub const API: &str = "/api/v3";

/// The file of a key of the tests: `app.pem` is the app's, as GitHub gives them (`app.pkcs8.pem` is the same key, `app.public.pem`
/// its public half), `other.pem` somebody else's, `elliptic.pem` no RSA key, `words.txt` no key at all. They are made once, by
/// whichever test asks first, and are known to nobody's GitHub.
pub fn key_file(name: &str) -> PathBuf {
    let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let keys = place.join("github-app-keys");
    if !keys.exists() {
        let draft = tempfile::tempdir_in(place).unwrap();
        make_keys(draft.path());
        // Another test may have been quicker: then theirs are everybody's.
        match std::fs::rename(draft.path(), &keys) {
            Ok(()) => drop(draft.keep()),
            Err(error) => assert!(keys.exists(), "{error}"),
        }
    }
    keys.join(name)
}

fn make_keys(folder: &Path) {
    for command in [
        "genrsa -traditional -out app.pem 2048",
        "genrsa -traditional -out other.pem 2048",
        "pkcs8 -topk8 -nocrypt -in app.pem -out app.pkcs8.pem",
        "rsa -in app.pem -RSAPublicKey_out -out app.public.pem",
        "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out elliptic.pem",
    ] {
        let made = Command::new("openssl")
            .args(command.split(' '))
            .current_dir(folder)
            .output()
            .expect("openssl is there; `make test` installs it");
        assert!(made.status.success(), "openssl {command}: {made:?}");
    }
    std::fs::write(folder.join("words.txt"), "no key\n").unwrap();
}

/// What the API is like today.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Api {
    /// It answers whoever is the app.
    Fine,
    /// It never answers.
    Silent,
    /// It always answers this.
    Answers(u16),
    /// It has been asked too often.
    Limits,
    /// It sends everybody elsewhere.
    Redirects(String),
    /// It says where the app is installed, but gives no token for the repository.
    NoToken,
    /// Its answers are not GitHub's.
    Nonsense,
    /// They are, but for a token that is two lines.
    Lines,
}

/// The double.
pub struct GitHub {
    mood: Mutex<Api>,
    /// How long the next tokens hold.
    holds: Mutex<SignedDuration>,
    minted: Mutex<Vec<String>>,
    asked: Mutex<Vec<String>>,
    /// What was wrong with proofs.
    wrong: Mutex<Vec<String>>,
    public_key: Vec<u8>,
}

impl Default for GitHub {
    fn default() -> Self {
        let pem = std::fs::read_to_string(key_file("app.public.pem")).unwrap();
        let lines = pem.lines().filter(|line| !line.starts_with('-'));
        Self {
            mood: Mutex::new(Api::Fine),
            holds: Mutex::new(SignedDuration::from_hours(1)),
            minted: Mutex::default(),
            asked: Mutex::default(),
            wrong: Mutex::default(),
            public_key: STANDARD.decode(lines.collect::<String>()).unwrap(),
        }
    }
}

impl GitHub {
    pub fn set_mood(&self, mood: Api) {
        *self.mood.lock().unwrap() = mood;
    }

    pub fn set_holds(&self, holds: SignedDuration) {
        *self.holds.lock().unwrap() = holds;
    }

    /// The tokens that it gave, the newest last.
    pub fn minted(&self) -> Vec<String> {
        self.minted.lock().unwrap().clone()
    }

    /// Methods and paths.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    pub fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap().clone()
    }

    pub async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().strip_prefix(API).unwrap().to_owned();
        let ask = format!("{} {path}", request.method());
        self.asked.lock().unwrap().push(ask);
        let header = request.headers().get(AUTHORIZATION).cloned();
        let proof = header.as_ref().and_then(|header| header.to_str().ok());
        let proof = proof.and_then(|proof| proof.strip_prefix("Bearer "));
        let known = self.is_app(proof.unwrap_or_default());
        let is_post = request.method() == Method::POST;
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mood = self.mood.lock().unwrap().clone();
        match &mood {
            Api::Silent => std::future::pending().await,
            Api::Answers(status) => return said(*status, &json!({"message": "No"})),
            Api::Limits => {
                let mut response = said(403, &json!({"message": "Slow down"}));
                response.headers_mut().insert(RETRY_AFTER, 60.into());
                return response;
            }
            Api::Redirects(to) => {
                let mut response = said(307, &Value::Null);
                let to = format!("{to}{API}{path}").parse().unwrap();
                response.headers_mut().insert(LOCATION, to);
                return response;
            }
            Api::Nonsense => return said(200, &json!({"id": "an installation"})),
            Api::Fine | Api::NoToken | Api::Lines => {}
        }
        if let Err(wrong) = known {
            self.wrong.lock().unwrap().push(wrong);
            return said(
                401,
                &json!({"message": "A JSON web token could not be decoded"}),
            );
        }
        let tokens = format!("/app/installations/{INSTALLATION}/access_tokens");
        match path.as_str() {
            "/repos/acme/repository/installation" if !is_post => said(
                200,
                &json!({"id": INSTALLATION, "account": {"login": "acme"}}),
            ),
            path if path == tokens && is_post => {
                let wanted =
                    json!({"repositories": ["repository"], "permissions": {"contents": "write"}});
                if body != wanted || mood == Api::NoToken {
                    return said(
                        422,
                        &json!({"message": "The permissions requested are not granted"}),
                    );
                }
                let mut minted = self.minted.lock().unwrap();
                let token = format!("ghs_canary{}", minted.len() + 1);
                minted.push(token.clone());
                let shown = if mood == Api::Lines {
                    "ghs\nquit=1"
                } else {
                    &token
                };
                let until = Timestamp::now() + *self.holds.lock().unwrap();
                said(
                    201,
                    &json!({"token": shown, "expires_at": until.to_string(), "permissions": {"contents": "write", "metadata": "read"}}),
                )
            }
            _ => said(404, &json!({"message": "Not Found"})),
        }
    }

    /// Whether this is a proof as GitHub takes it: signed by the app's key, for a few minutes from about now.
    fn is_app(&self, proof: &str) -> Result<(), String> {
        let mut parts = proof.rsplitn(2, '.');
        let (signature, text) = (
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_default(),
        );
        let decoded = |part: &str| {
            URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|error| error.to_string())
        };
        let value = |part: Option<&str>| -> Result<Value, String> {
            let bytes = decoded(part.unwrap_or_default())?;
            serde_json::from_slice(&bytes).map_err(|error| error.to_string())
        };
        let (header, claims) = (
            value(text.split('.').next())?,
            value(text.split('.').nth(1))?,
        );
        if header != json!({"alg": "RS256", "typ": "JWT"}) || claims["iss"] != APP {
            return Err(format!("{header} {claims}"));
        }
        let now = Timestamp::now().as_second();
        let (from, to) = (
            claims["iat"].as_i64().unwrap_or(i64::MAX),
            claims["exp"].as_i64().unwrap_or(0),
        );
        if from > now || to <= now || to > now + 600 {
            return Err(format!("now is {now}: {claims}"));
        }
        let all = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        let rs256 = all
            .mapping
            .iter()
            .find(|(scheme, _)| *scheme == SignatureScheme::RSA_PKCS1_SHA256);
        let signature = decoded(signature)?;
        rs256.unwrap().1[0]
            .verify_signature(&self.public_key, text.as_bytes(), &signature)
            .map_err(|_| "the signature is somebody else's".to_owned())
    }
}

fn said(status: u16, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap();
    response
}
