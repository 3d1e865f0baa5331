//! What a sequence may say next, as the engine asks for it: masks over the vocabulary, one for each token to come.
//!
//! The engine knows no grammar: whoever submits a request brings the [`TokenConstraint`]. It is asked on the threads of
//! [`ConstraintPool`], never on the engine's. A constrained sequence has at most one token in flight, and its next row is
//! planned once its mask is there: other sequences run ahead meanwhile, and no rank ever waits for a mask.
//!
//! **Invariant:** a constraint is in one place: with its sequence, or at the pool with the token that it is to take in.
//! **Invariant:** at most one answer is outstanding for each sequence, so the channels of the pool never fill.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use phalanx_proto::{SeqId, TokenId};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Most threads of one engine that compute masks.
const NUM_THREADS_MAX: usize = 4;
/// How long an idle engine waits for further masks once the first is there, so that their rows share a step.
const GATHER_PATIENCE: Duration = Duration::from_millis(1);

/// Limits the tokens of one sequence. Called from one thread at a time, and free to take a millisecond or so.
pub trait TokenConstraint: Send + fmt::Debug {
    /// The tokens that may come next.
    ///
    /// # Errors
    /// The constraint cannot go on, such as by a limit on the work of one mask; the sequence ends.
    fn mask(&mut self) -> Result<NextTokens, ConstraintError>;

    /// Takes in a token that was drawn among those of the last mask.
    ///
    /// # Errors
    /// The token is not one of them; the sequence ends.
    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError>;

    /// Takes back the last tokens: drafts that were not accepted.
    ///
    /// # Errors
    /// Fewer tokens were taken in.
    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError>;

    /// The same constraint for another sequence.
    fn fork(&self) -> Box<dyn TokenConstraint>;
}

/// What may come next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NextTokens {
    /// Every token.
    Any,
    /// Token `t` where bit `t % 32` of word `t / 32` is set.
    Only(Arc<[u32]>),
    /// Nothing: the text is complete.
    Done,
}

/// Why a constraint gave up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ConstraintError {
    /// In words for the client.
    pub reason: String,
}

/// A constraint with the tokens that it allows now.
#[derive(Debug)]
pub struct Constraint {
    rules: Box<dyn TokenConstraint>,
    next: NextTokens,
}

impl Constraint {
    /// Computes the first mask; to be called where a millisecond does not matter.
    ///
    /// # Errors
    /// The constraint allows nothing from the start.
    pub fn new(mut rules: Box<dyn TokenConstraint>) -> Result<Self, ConstraintError> {
        match checked(rules.mask()?)? {
            NextTokens::Done => Err(ConstraintError { reason: "it allows no text at all".into() }),
            next => Ok(Self { rules, next }),
        }
    }

    /// What may come next.
    pub fn next(&self) -> &NextTokens {
        &self.next
    }

    /// The rules alone, for another constraint that adds to them.
    pub fn into_rules(self) -> Box<dyn TokenConstraint> {
        self.rules
    }

    /// Takes a token in and computes the next mask.
    ///
    /// # Errors
    /// The token is not allowed, or no other can follow it.
    pub fn commit(mut self, token: TokenId) -> Result<Self, ConstraintError> {
        self.rules.commit(token)?;
        self.next = checked(self.rules.mask()?)?;
        Ok(self)
    }
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Self { rules: self.rules.fork(), next: self.next.clone() }
    }
}

/// A mask without a token would leave the sampler nothing to draw.
fn checked(next: NextTokens) -> Result<NextTokens, ConstraintError> {
    match &next {
        NextTokens::Only(words) if words.iter().all(|word| *word == 0) => {
            Err(ConstraintError { reason: "no token of the vocabulary can continue the text".into() })
        }
        _ => Ok(next),
    }
}

/// Where the constraint of a sequence is.
#[derive(Debug)]
pub(super) enum ConstraintState {
    /// Its mask is known: a token may be drawn.
    Ready(Constraint),
    /// A plan in flight draws a token by it.
    InFlight(Constraint),
    /// The pool computes the next mask.
    Away,
}

impl ConstraintState {
    /// The plan in flight is lost: its token is drawn again by the same mask. What the pool computes is about tokens that are known.
    pub(super) fn interrupted(self) -> Self {
        match self {
            Self::InFlight(constraint) => Self::Ready(constraint),
            other => other,
        }
    }
}

/// A committed token that a constraint is to take in.
#[derive(Debug)]
pub(super) struct ConstraintWork {
    pub(super) id: SeqId,
    pub(super) constraint: Constraint,
    pub(super) token: TokenId,
}

/// The constraint with its next mask, or why there is none.
#[derive(Debug)]
pub(super) struct ConstraintAnswer {
    pub(super) id: SeqId,
    pub(super) result: Result<Constraint, ConstraintError>,
}

impl ConstraintWork {
    pub(super) fn run(self) -> ConstraintAnswer {
        let Self { id, constraint, token } = self;
        let result = catch_unwind(AssertUnwindSafe(move || constraint.commit(token)));
        let broke = |_| Err(ConstraintError { reason: "the constraint broke".into() });
        ConstraintAnswer { id, result: result.unwrap_or_else(broke) }
    }
}

/// The threads of one engine that compute masks; they start with the first constrained sequence.
#[derive(Debug)]
pub(super) struct ConstraintPool {
    capacity: usize,
    threads: Option<SyncSender<ConstraintWork>>,
    answers: mpsc::Receiver<ConstraintAnswer>,
    /// Kept for the threads to come, and so that `answers` never closes.
    answering: mpsc::Sender<ConstraintAnswer>,
    num_outstanding: usize,
    arrived: Vec<ConstraintAnswer>,
}

impl ConstraintPool {
    /// No threads yet. `capacity`: sequences that may be constrained at once.
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, tokio::sync::Semaphore::MAX_PERMITS);
        let (answering, answers) = mpsc::channel(capacity);
        Self { capacity, threads: None, answers, answering, num_outstanding: 0, arrived: Vec::new() }
    }

    /// Hands work to the threads; what cannot be handed over is answered with the reason.
    pub(super) fn submit(&mut self, work: Vec<ConstraintWork>) {
        for work in work {
            let id = work.id;
            let refused =
                |reason: &str| ConstraintAnswer { id, result: Err(ConstraintError { reason: reason.into() }) };
            match self.threads().map(|threads| threads.try_send(work)) {
                Ok(Ok(())) => self.num_outstanding += 1,
                Ok(Err(_)) => self.arrived.push(refused("more masks are asked for than sequences run")),
                Err(error) => self.arrived.push(refused(&format!("no thread for masks: {error}"))),
            }
        }
    }

    /// The answers that are there.
    pub(super) fn take(&mut self) -> Vec<ConstraintAnswer> {
        while let Ok(answer) = self.answers.try_recv() {
            self.arrive(answer);
        }
        std::mem::take(&mut self.arrived)
    }

    /// Resolves when there is an answer, and those that follow closely; never where none is outstanding. Nothing is lost
    /// where the wait is given up.
    pub(super) async fn arrivals(&mut self) {
        if self.arrived.is_empty() {
            match self.answers.recv().await {
                Some(answer) => self.arrive(answer),
                None => std::future::pending().await,
            }
        }
        let rest = async {
            while self.num_outstanding > 0 {
                let Some(answer) = self.answers.recv().await else { return };
                self.arrive(answer);
            }
        };
        let _in_time = timeout(GATHER_PATIENCE, rest).await;
    }

    fn arrive(&mut self, answer: ConstraintAnswer) {
        self.num_outstanding = self.num_outstanding.saturating_sub(1);
        self.arrived.push(answer);
    }

    fn threads(&mut self) -> std::io::Result<&SyncSender<ConstraintWork>> {
        let sender = match self.threads.take() {
            Some(sender) => sender,
            None => self.start()?,
        };
        Ok(self.threads.insert(sender))
    }

    fn start(&self) -> std::io::Result<SyncSender<ConstraintWork>> {
        let (sender, inbox) = sync_channel(self.capacity);
        let inbox = Arc::new(Mutex::new(inbox));
        let num_cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..num_cpus.div_ceil(2).min(NUM_THREADS_MAX) {
            let (inbox, answering) = (Arc::clone(&inbox), self.answering.clone());
            let body = move || answer_all(&inbox, &answering);
            std::thread::Builder::new().name("masks".into()).spawn(body)?;
        }
        Ok(sender)
    }
}

/// A thread's life: it ends with its engine.
fn answer_all(inbox: &Mutex<Receiver<ConstraintWork>>, answering: &mpsc::Sender<ConstraintAnswer>) {
    loop {
        let work = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(work) = work else { return };
        if answering.blocking_send(work.run()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Allows the tokens of a list of sets, one after the other, then nothing more.
    #[derive(Debug, Clone)]
    pub(in crate::engine) struct Listed {
        sets: Arc<Vec<Vec<u32>>>,
        at: usize,
    }

    impl Listed {
        pub(in crate::engine) fn constraint(sets: Vec<Vec<u32>>) -> Constraint {
            Constraint::new(Box::new(Self { sets: Arc::new(sets), at: 0 })).unwrap()
        }
    }

    impl TokenConstraint for Listed {
        fn mask(&mut self) -> Result<NextTokens, ConstraintError> {
            let Some(set) = self.sets.get(self.at) else { return Ok(NextTokens::Done) };
            if set.is_empty() {
                return Ok(NextTokens::Any);
            }
            let mut words = vec![0; 4];
            for token in set {
                words[*token as usize / 32] |= 1 << (token % 32);
            }
            Ok(NextTokens::Only(words.into()))
        }

        fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
            let set = &self.sets[self.at];
            if !set.is_empty() && !set.contains(&token.0) {
                return Err(ConstraintError { reason: format!("token {token} is not allowed") });
            }
            self.at += 1;
            Ok(())
        }

        fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
            self.at = self.at.checked_sub(num_tokens).ok_or_else(|| ConstraintError { reason: "too far".into() })?;
            Ok(())
        }

        fn fork(&self) -> Box<dyn TokenConstraint> {
            Box::new(self.clone())
        }
    }

    #[tokio::test]
    async fn masks_come_back_with_their_sequence() {
        let mut pool = ConstraintPool::new(8);
        let work = |id, token| ConstraintWork {
            id: SeqId(id),
            constraint: Listed::constraint(vec![vec![1, 2], vec![3]]),
            token: TokenId(token),
        };
        pool.submit(vec![work(1, 1), work(2, 9), work(3, 2)]);
        let mut answers = Vec::new();
        while answers.len() < 3 {
            pool.arrivals().await;
            answers.append(&mut pool.take());
        }
        answers.sort_by_key(|answer| answer.id);
        let told: Vec<Result<NextTokens, String>> =
            answers.into_iter().map(|answer| answer.result.map(|it| it.next).map_err(|error| error.reason)).collect();
        let next = NextTokens::Only([1 << 3, 0, 0, 0].into());
        assert_eq!(told, [Ok(next.clone()), Err("token 9 is not allowed".into()), Ok(next)]);
        assert_eq!(pool.num_outstanding, 0);
    }

    #[test]
    fn a_mask_without_a_token_is_refused() {
        let empty = NextTokens::Only([0, 0].into());
        assert!(checked(empty).is_err());
        assert_eq!(checked(NextTokens::Done), Ok(NextTokens::Done));
    }
}
