//! What is encrypted: the value together with the project and the name that it belongs to, checked when it is opened.

use ports::{Plaintext, SecretHandle};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::{Error, Identity};

#[derive(Serialize)]
struct Sealed<'a> {
    version: u32,
    project: &'a str,
    name: &'a str,
    value: &'a str,
}

#[derive(Deserialize)]
struct Opened {
    version: u32,
    project: String,
    name: String,
    value: String,
}

pub(crate) fn seal(
    identity: &Identity,
    handle: &SecretHandle,
    value: &Plaintext,
) -> Result<Vec<u8>, Error> {
    let sealed = Sealed {
        version: 1,
        project: handle.project.as_str(),
        name: &handle.name,
        value: value.expose(),
    };
    // Room for everything beforehand, so that no copy is left behind by growing.
    let mut text = Zeroizing::new(Vec::with_capacity(value.expose().len() * 6 + 512));
    serde_json::to_writer(&mut *text, &sealed).expect("strings become JSON");
    identity.encrypt(&text)
}

pub(crate) fn open(
    identity: &Identity,
    handle: &SecretHandle,
    ciphertext: &[u8],
) -> Result<Plaintext, Error> {
    let unreadable = |reason| Error::Unreadable {
        handle: handle.clone(),
        reason,
    };
    let text = identity
        .decrypt(ciphertext)
        .ok_or_else(|| unreadable("it does not open with this age identity, or was damaged"))?;
    let mut opened: Opened = serde_json::from_slice(&text)
        .map_err(|_| unreadable("what is encrypted has another form"))?;
    let value = Plaintext::new(std::mem::take(&mut opened.value));
    let belongs = opened.project == handle.project.as_str() && opened.name == handle.name;
    opened.project.zeroize();
    if opened.version != 1 {
        return Err(unreadable(
            "it was written by a newer version of the program",
        ));
    }
    if !belongs {
        return Err(unreadable("it was encrypted for another project or name"));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(project: &str, name: &str) -> SecretHandle {
        SecretHandle {
            project: project.into(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_value_opens_only_where_it_belongs() {
        let identity = Identity::generate();
        let own = handle("p1", "KEY");
        let value = "line\nand \"quotes\" é \u{1}";
        let sealed = seal(&identity, &own, &Plaintext::new(value.to_owned())).unwrap();
        assert_eq!(open(&identity, &own, &sealed).unwrap().expose(), value);
        for other in [handle("p2", "KEY"), handle("p1", "OTHER")] {
            let error = open(&identity, &other, &sealed).err().unwrap().to_string();
            assert!(error.contains("another project or name"), "{error}");
        }
        let error = open(&Identity::generate(), &own, &sealed).err().unwrap();
        assert!(error.to_string().contains("does not open"), "{error}");
    }

    #[test]
    fn a_damaged_value_does_not_open() {
        let identity = Identity::generate();
        let own = handle("p1", "KEY");
        let mut sealed = seal(&identity, &own, &Plaintext::new("value".to_owned())).unwrap();
        let last = sealed.len() - 1;
        sealed[last] ^= 1;
        assert!(open(&identity, &own, &sealed).is_err());
        assert!(open(&identity, &own, b"").is_err());
    }
}
