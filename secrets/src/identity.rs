//! The age key that opens the vault.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use age::x25519;
use secrecy::ExposeSecret;
use zeroize::Zeroizing;

use crate::Error;

/// The identity's file in `ARTEL_HOME`.
pub const IDENTITY_FILE: &str = "identity.age-key";

/// No key file is longer, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Where the identity comes from.
pub enum IdentitySource {
    /// `SOPS_AGE_KEY`: the key itself.
    Key(ports::Plaintext),
    /// `SOPS_AGE_KEY_FILE`: a file that must exist.
    File(PathBuf),
    /// A file in `ARTEL_HOME` that is made when it is missing.
    Home(PathBuf),
}

impl IdentitySource {
    /// The key given in `SOPS_AGE_KEY`, else the file named by `SOPS_AGE_KEY_FILE`, else `identity.age-key` in `home`.
    pub fn choose(
        home: &Path,
        sops_age_key: Option<ports::Plaintext>,
        sops_age_key_file: Option<PathBuf>,
    ) -> Self {
        match (sops_age_key, sops_age_key_file) {
            (Some(key), _) if !key.expose().trim().is_empty() => Self::Key(key),
            (_, Some(path)) if !path.as_os_str().is_empty() => Self::File(path),
            _ => Self::Home(home.join(IDENTITY_FILE)),
        }
    }
}

/// An age identity: new values are encrypted to its first key, old ones open with any of its keys.
pub struct Identity {
    keys: Vec<x25519::Identity>,
    origin: String,
}

impl Identity {
    /// Reads the identity, or makes the one in `ARTEL_HOME` when it is missing. Of two processes that make it at once,
    /// both use the same one.
    pub fn load(source: &IdentitySource) -> Result<Self, Error> {
        match source {
            IdentitySource::Key(key) => Self::parse(key.expose(), "SOPS_AGE_KEY".to_owned()),
            IdentitySource::File(path) => {
                Self::read(path).map_err(|source| Error::IdentityFile {
                    path: path.clone(),
                    doing: "read",
                    source,
                })?
            }
            IdentitySource::Home(path) => Self::in_home(path),
        }
    }

    /// A new one that lives only in memory.
    pub fn generate() -> Self {
        Self {
            keys: vec![x25519::Identity::generate()],
            origin: "memory".to_owned(),
        }
    }

    /// The public key, `age1…`, that others encrypt to.
    pub fn recipient(&self) -> String {
        self.keys[0].to_public().to_string()
    }

    /// Where it came from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    fn in_home(path: &Path) -> Result<Self, Error> {
        let failed = |doing| {
            move |source| Error::IdentityFile {
                path: path.to_owned(),
                doing,
                source,
            }
        };
        match std::fs::metadata(path) {
            Ok(found) => {
                let mode = found.permissions().mode() & 0o777;
                if mode & 0o077 != 0 {
                    return Err(Error::IdentityExposed {
                        path: path.to_owned(),
                        mode,
                    });
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make(path).map_err(failed("written"))?;
            }
            Err(error) => return Err(failed("read")(error)),
        }
        Self::read(path).map_err(failed("read"))?
    }

    fn read(path: &Path) -> std::io::Result<Result<Self, Error>> {
        let mut text = Zeroizing::new(String::with_capacity(4096));
        File::open(path)?
            .take(MAX_FILE_BYTES)
            .read_to_string(&mut text)?;
        Ok(Self::parse(&text, path.display().to_string()))
    }

    fn parse(text: &str, origin: String) -> Result<Self, Error> {
        let keys: Result<Vec<x25519::Identity>, _> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::parse)
            .collect();
        match keys {
            Ok(keys) if !keys.is_empty() => Ok(Self { keys, origin }),
            _ => Err(Error::IdentityMalformed { origin }),
        }
    }

    pub(crate) fn encrypt(&self, text: &[u8]) -> Result<Vec<u8>, Error> {
        age::encrypt(&self.keys[0].to_public(), text).map_err(Error::Encrypt)
    }

    pub(crate) fn decrypt(&self, ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let decryptor = age::Decryptor::new_buffered(ciphertext).ok()?;
        let keys = self.keys.iter().map(|key| key as &dyn age::Identity);
        let mut reader = decryptor.decrypt(keys).ok()?;
        let mut text = Zeroizing::new(Vec::with_capacity(ciphertext.len()));
        reader.read_to_end(&mut text).ok()?;
        Some(text)
    }
}

impl std::fmt::Debug for Identity {
    /// The public half only.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("origin", &self.origin)
            .field("recipient", &self.recipient())
            .finish_non_exhaustive()
    }
}

/// Writes a new key beside `path` and links it there, so that the file appears at once, whole, and never replaces one.
fn make(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let draft = folder.join(format!(
        ".{IDENTITY_FILE}.{}",
        uuid::Uuid::new_v4().simple()
    ));
    let key = x25519::Identity::generate();
    let text = Zeroizing::new(format!(
        "# The age identity of this installation's vault. Keep a copy: without it no stored secret can be read.\n# public key: {}\n{}\n",
        key.to_public(),
        key.to_string().expose_secret()
    ));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
    let linked = written.and_then(|()| match std::fs::hard_link(&draft, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    });
    let removed = std::fs::remove_file(&draft);
    linked?;
    removed?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn the_identity_is_made_once_and_only_its_owner_can_read_it() {
        let home = home();
        let source = IdentitySource::choose(home.path(), None, None);
        let first = Identity::load(&source).unwrap();
        let again = Identity::load(&source).unwrap();
        assert_eq!(first.recipient(), again.recipient());
        let path = home.path().join(IDENTITY_FILE);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            std::fs::read_dir(home.path()).unwrap().count(),
            1,
            "a draft was left"
        );
    }

    #[test]
    fn threads_that_make_it_at_once_get_the_same_one() {
        let home = home();
        let recipients: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let source = IdentitySource::choose(home.path(), None, None);
                        Identity::load(&source).unwrap().recipient()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(
            recipients.iter().all(|one| *one == recipients[0]),
            "{recipients:?}"
        );
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let home = home();
        let source = IdentitySource::choose(home.path(), None, None);
        Identity::load(&source).unwrap();
        let path = home.path().join(IDENTITY_FILE);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = Identity::load(&source).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_given_key_goes_before_a_given_file_and_before_the_home() {
        let home = home();
        let given = x25519::Identity::generate();
        let text = given.to_string().expose_secret().to_owned();
        let file = home.path().join("keys.txt");
        std::fs::write(&file, format!("# a comment\n{text}\n")).unwrap();
        let by_file = IdentitySource::choose(home.path(), None, Some(file));
        assert_eq!(
            Identity::load(&by_file).unwrap().recipient(),
            given.to_public().to_string()
        );
        let key = ports::Plaintext::new(text);
        let by_key = IdentitySource::choose(home.path(), Some(key), Some("/does/not/exist".into()));
        assert_eq!(
            Identity::load(&by_key).unwrap().recipient(),
            given.to_public().to_string()
        );
        assert!(!home.path().join(IDENTITY_FILE).exists());
    }

    #[test]
    fn what_is_no_key_is_not_repeated() {
        let key = ports::Plaintext::new("AGE-SECRET-KEY-1CANARY".to_owned());
        let error = Identity::load(&IdentitySource::Key(key)).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(
            text.contains("SOPS_AGE_KEY") && !text.contains("CANARY"),
            "{text}"
        );
        let missing = Identity::load(&IdentitySource::File("/does/not/exist".into())).unwrap_err();
        assert!(missing.to_string().contains("/does/not/exist"), "{missing}");
    }

    #[test]
    fn debug_shows_the_public_half_only() {
        let identity = Identity::generate();
        let secret = identity.keys[0].to_string().expose_secret().to_owned();
        assert!(!format!("{identity:?}").contains(&secret));
    }
}
