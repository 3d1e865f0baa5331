//! `coordinator chat`: a conversation in the terminal, or through a pipe.
//!
//! **Invariant:** only answers go to stdout; a message whose answer failed is not part of the conversation.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::launch::runtime;
use super::sampling_flags::SamplingFlags;
use super::target::{Target, TargetFlags};
use super::{CliError, Outcome, Surroundings};

const COMMANDS: &str = "/reset forgets the conversation, /system TEXT sets the system message, /exit or Ctrl-D ends";

/// Talk to a model
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Type /help for commands. Lines from a pipe are messages, one after the other.\n\nExample:\n  coordinator \
                        chat ./Qwen2.5-7B-Instruct\n  echo 'What is a monad?' | coordinator chat ./model.gguf"
)]
pub struct ChatFlags {
    #[command(flatten)]
    target: TargetFlags,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Most tokens of an answer [default: what the context leaves]
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
}

pub(super) fn run(surroundings: &Surroundings, flags: &ChatFlags) -> Outcome {
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let target = flags.target.open(surroundings).await?;
        let mut conversation = Conversation::new(flags);
        let outcome = talk(&target, &mut conversation).await;
        target.end_with(outcome).await
    });
    // The thread that reads the terminal may still wait for a line.
    runtime.shutdown_background();
    outcome
}

/// What was said, and how answers are asked for.
struct Conversation {
    system: Option<String>,
    turns: Vec<Value>,
    fields: serde_json::Map<String, Value>,
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    Reset,
    System(&'a str),
    Help,
    Exit,
    Unknown(&'a str),
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "" => Self::Nothing,
            "/reset" | "/clear" => Self::Reset,
            "/system" => Self::System(rest.trim()),
            "/help" | "/?" => Self::Help,
            "/exit" | "/quit" | "/bye" => Self::Exit,
            command if is_command(command) => Self::Unknown(command),
            _ => Self::Say(line),
        }
    }
}

/// `/word`, but no path such as `/etc/hosts`.
fn is_command(word: &str) -> bool {
    word.strip_prefix('/').is_some_and(|rest| rest.chars().all(|c| c.is_ascii_lowercase()))
}

impl Conversation {
    fn new(flags: &ChatFlags) -> Self {
        let mut fields = flags.sampling.fields();
        if let Some(max_tokens) = flags.max_tokens {
            fields.insert("max_tokens".into(), max_tokens.into());
        }
        Self { system: flags.system.clone(), turns: Vec::new(), fields }
    }

    fn say(&mut self, role: &str, content: &str) {
        self.turns.push(json!({"role": role, "content": content}));
    }

    fn body(&self, model: &str) -> Value {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.turns.iter().cloned()).collect();
        let mut body = self.fields.clone();
        body.insert("model".into(), model.into());
        body.insert("messages".into(), messages.into());
        body.insert("stream".into(), true.into());
        body.into()
    }
}

/// Reads lines and answers them until the end.
async fn talk(target: &Target, conversation: &mut Conversation) -> Outcome {
    let interactive = std::io::stdin().is_terminal();
    let mut lines = Lines::spawn()?;
    if interactive {
        eprintln!("{} is ready. {COMMANDS}", target.model);
    }
    loop {
        if interactive {
            eprint!(">>> ");
        }
        let Some(line) = lines.next().await? else { return Ok(()) };
        match Line::parse(&line) {
            Line::Nothing => {}
            Line::Exit => return Ok(()),
            Line::Help => eprintln!("{COMMANDS}"),
            Line::Unknown(command) => eprintln!("no such command: {command}. {COMMANDS}"),
            Line::Reset => conversation.turns.clear(),
            Line::System(text) => conversation.system = (!text.is_empty()).then(|| text.to_owned()),
            Line::Say(text) => match answer(target, conversation, text).await {
                Err(error) if interactive && error.exit == CliError::FAILED => eprintln!("error: {}", error.message),
                other => other?,
            },
        }
    }
}

/// Asks, and prints the answer as it comes. Ctrl-C cuts it short; what came so far stays in the conversation.
async fn answer(target: &Target, conversation: &mut Conversation, text: &str) -> Outcome {
    conversation.say("user", text);
    let mut said = String::new();
    let outcome = tokio::select! {
        outcome = print_answer(target, conversation.body(&target.model), &mut said) => outcome,
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    println!();
    match outcome {
        Ok(()) => conversation.say("assistant", &said),
        Err(_) => drop(conversation.turns.pop()),
    }
    outcome
}

async fn print_answer(target: &Target, body: Value, said: &mut String) -> Outcome {
    let mut stream = target.client.stream("/v1/chat/completions", &body).await?;
    let mut stdout = std::io::stdout();
    while let Some(chunk) = stream.next().await? {
        if let Some(piece) = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str) {
            said.push_str(piece);
            stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush())?;
        }
    }
    Ok(())
}

/// Lines of stdin, read on a thread of their own.
struct Lines {
    lines: mpsc::Receiver<std::io::Result<String>>,
}

impl Lines {
    fn spawn() -> Result<Self, CliError> {
        let (sender, lines) = mpsc::channel(1);
        let read = move || {
            for line in std::io::stdin().lock().lines() {
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("stdin".into()).spawn(read)?;
        Ok(Self { lines })
    }

    /// The next line; `None` at the end of the input, and at Ctrl-C.
    async fn next(&mut self) -> Result<Option<String>, CliError> {
        tokio::select! {
            line = self.lines.recv() => Ok(line.transpose()?),
            _ = tokio::signal::ctrl_c() => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let check = |line: &str, expected: Line<'_>| assert_eq!(Line::parse(line), expected, "{line}");
        check("  ", Line::Nothing);
        check("hello there", Line::Say("hello there"));
        check("/exit", Line::Exit);
        check(" /reset ", Line::Reset);
        check("/system You are brief.", Line::System("You are brief."));
        check("/system", Line::System(""));
        check("/frobnicate now", Line::Unknown("/frobnicate"));
        check("/etc/hosts is what?", Line::Say("/etc/hosts is what?"));
        check("a / b", Line::Say("a / b"));
    }
}
