//! An engine that gives no answer, as when it is started anew.

use bollard::errors::Error as DockerError;
use std::time::Duration;
use tokio::time::Instant;

/// How long an engine that does not answer is asked again.
pub(super) const PATIENCE: Duration = Duration::from_mins(2);
/// The pause between two such questions.
pub(super) const AGAIN: Duration = Duration::from_millis(500);

/// Asks again while the engine gives no answer, as when it is started anew. Whatever is asked for must bear being done twice.
pub(super) async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, DockerError>
where
    F: Future<Output = Result<T, DockerError>>,
{
    with_absences(ask).await.0
}

/// The same, and how often there was no answer: what was asked for may then have been done by half.
pub(super) async fn with_absences<T, F>(ask: impl Fn() -> F) -> (Result<T, DockerError>, u32)
where
    F: Future<Output = Result<T, DockerError>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut absences = 0;
    loop {
        match ask().await {
            Err(error) if is_away(&error) && Instant::now() < deadline => {
                tracing::debug!(%error, "the engine gives no answer; asking again");
                absences += 1;
                tokio::time::sleep(AGAIN).await;
            }
            answer => return (answer, absences),
        }
    }
}

/// Whether this says that the engine is not there, or is just coming or going.
fn is_away(error: &DockerError) -> bool {
    const BETWEEN: [&str; 5] = [
        "containerd.sock",
        "shutting down",
        "ttrpc: closed",
        "context canceled",
        "Unavailable",
    ];
    match error {
        DockerError::DockerResponseServerError {
            status_code: 500..,
            message,
        } => BETWEEN.iter().any(|words| message.contains(words)),
        DockerError::HyperResponseError { .. }
        | DockerError::HyperLegacyError { .. }
        | DockerError::IOError { .. }
        | DockerError::RequestTimeoutError => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn said(status_code: u16, message: &str) -> DockerError {
        DockerError::DockerResponseServerError {
            status_code,
            message: message.to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_comes_back_is_asked_again_and_its_absences_are_told() {
        let answers = RefCell::new(vec![
            Ok(1),
            Err(said(500, "the daemon is shutting down")),
            Err(DockerError::RequestTimeoutError),
        ]);
        let (answer, absences) =
            with_absences(|| std::future::ready(answers.borrow_mut().pop().unwrap())).await;
        assert_eq!((answer.unwrap(), absences), (1, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_engine_refuses_is_not_asked_again() {
        let asked = RefCell::new(0);
        let (answer, absences) = with_absences(|| {
            *asked.borrow_mut() += 1;
            std::future::ready(Err::<(), _>(said(500, "failed to start shim: file exists")))
        })
        .await;
        assert!(answer.is_err());
        assert_eq!((*asked.borrow(), absences), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_stays_away_is_given_up() {
        let away = || std::future::ready(Err::<(), _>(DockerError::RequestTimeoutError));
        let begun = Instant::now();
        assert!(patiently(away).await.is_err());
        assert!(begun.elapsed() >= PATIENCE && begun.elapsed() < 2 * PATIENCE);
    }
}
