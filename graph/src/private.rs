//! What the code written by `#[derive(State)]` calls. Not for anybody else; may change at any time.

use std::{fmt, future::poll_fn, pin::Pin};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use crate::state::{ChannelError, State, Update};

pub use serde;
pub use serde_json::Value;

pub fn to_value<T: Serialize>(channel: &'static str, value: &T) -> Result<Value, ChannelError> {
    serde_json::to_value(value).map_err(|source| ChannelError::Value { channel, source })
}

pub fn from_value<T: DeserializeOwned>(
    channel: &'static str,
    value: Value,
) -> Result<T, ChannelError> {
    serde_json::from_value(value).map_err(|source| ChannelError::Value { channel, source })
}

/// The same of a value that is needed afterwards.
pub fn from_ref<T: DeserializeOwned>(
    channel: &'static str,
    value: &Value,
) -> Result<T, ChannelError> {
    T::deserialize(value).map_err(|source| ChannelError::Value { channel, source })
}

pub fn unknown_channel<S: State>(channel: String) -> ChannelError {
    let known = S::CHANNELS
        .iter()
        .map(|channel| format!("`{}`", channel.name))
        .collect::<Vec<_>>()
        .join(", ");
    ChannelError::Unknown { channel, known }
}

pub fn debug_update(f: &mut fmt::Formatter<'_>, name: &str, channels: &[&str]) -> fmt::Result {
    write!(f, "{name}({})", channels.join(", "))
}

pub fn serialize_update<U: Update, Z: Serializer>(
    update: &U,
    serializer: Z,
) -> Result<Z::Ok, Z::Error> {
    update
        .to_channels()
        .map_err(serde::ser::Error::custom)?
        .serialize(serializer)
}

pub fn deserialize_update<'de, U: Update, Z: Deserializer<'de>>(
    deserializer: Z,
) -> Result<U, Z::Error> {
    let value = Value::deserialize(deserializer)?;
    U::from_json(value).map_err(|error| serde::de::Error::custom(chain(&error)))
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Does some work while a future waits for the first time: what is dropped while a database writes delays nobody.
/// The future stays where its caller has pinned it: those that write are large.
pub(crate) async fn meanwhile<F: Future>(
    mut future: Pin<&mut F>,
    work: impl FnOnce(),
) -> F::Output {
    let mut work = Some(work);
    poll_fn(|context| {
        let polled = future.as_mut().poll(context);
        if let Some(work) = work.take() {
            work();
        }
        polled
    })
    .await
}
