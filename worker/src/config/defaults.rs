//! Defaults and limits: each with a name, a unit and a value.

use std::time::Duration;

/// Port of the head where an address names none.
pub const CLUSTER_PORT: u16 = 8001;
/// Time for one attempt to connect to the head.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Time for the head to answer a hello.
pub const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
/// Time for the head that was started together with an agent to listen.
pub const HEAD_START_DEADLINE: Duration = Duration::from_secs(30);
/// First pause between two attempts to reach the head; it doubles.
pub const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause between two attempts to reach the head.
pub const RETRY_PAUSE_MAX: Duration = Duration::from_secs(3);
/// Longest pause between attempts to reach a head that ranks wait for.
pub const RETRY_PAUSE_ORPHANED: Duration = Duration::from_millis(200);
/// Looks for the token of a head on this machine that listens already.
pub const TOKEN_LOOKS: u32 = 20;
/// Time between two of them.
pub const TOKEN_LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Shortest time between two looks at when this node's certificate ends.
pub const RENEWAL_LOOK: Duration = Duration::from_secs(1);
/// Longest time between two looks at when this node's certificate ends.
pub const RENEWAL_PAUSE: Duration = Duration::from_secs(600);
/// Rest before a renewal that failed is tried again.
pub const RENEWAL_RETRY: Duration = Duration::from_secs(5);
/// Attempts of a rank to reach the head that asked for it.
pub const RANK_CONNECT_ATTEMPTS: u32 = 5;
/// How long `worker join` waits for its background process to have joined before it returns.
pub const JOIN_REPORT_DEADLINE: Duration = Duration::from_secs(4);
/// Time for a rank to end after SIGTERM; then comes SIGKILL.
pub const RANK_END_DEADLINE: Duration = Duration::from_secs(3);
/// Most bytes of a log in one answer.
pub const LOG_PART_BYTES_MAX: u32 = 256 << 10;
/// Longest wait for the work of this machine to move elsewhere; then the agent is asked to end at once.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
/// Time for an agent to end after SIGTERM, its ranks included; then comes SIGKILL.
pub const AGENT_END_DEADLINE: Duration = Duration::from_secs(15);
/// Time for the last messages of a stream to reach the head.
pub const FLUSH_DEADLINE: Duration = Duration::from_secs(1);
/// Time for a stream to take one message.
pub const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// Time for a GPU library to say how many devices there are.
pub const PROBE_DEADLINE: Duration = Duration::from_secs(20);
/// Time between pings on an idle gRPC connection.
pub const KEEPALIVE: Duration = Duration::from_secs(1);
/// Silence after a ping that ends a connection.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// HTTP/2 window of a stream, bytes.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 window of a connection, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Messages that wait for the head.
pub const OUTBOX: usize = 64;
/// Orders and events that wait between the agent's threads.
pub const AGENT_QUEUE: usize = 256;
/// One log file; a second one of this size holds what came before.
pub const LOG_BYTES_MAX: u64 = 8 << 20;
/// Log files of ranks that are kept; the oldest go first.
pub const RANK_LOGS_MAX: usize = 64;
/// Last lines of a rank's log that the head is told.
pub const LAST_LINES: usize = 20;
/// Longest line of a rank's log that the head is told, bytes.
pub const LAST_LINE_BYTES_MAX: usize = 512;
