//! Two ranks prove to each other that they hold their group's key, without showing it.
//!
//! Dialler: magic, group, rank, nonce. Acceptor: nonce, proof. Dialler: proof. A proof is an HMAC (RFC 2104) over the label of
//! its side, both ranks and both nonces, so it cannot be replayed, reflected or used between other ranks.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::Place;

const MAGIC: [u8; 8] = *b"phalanx1";
const HELLO_BYTES: usize = 8 + 16 + 4 + 32;

type Nonce = [u8; 32];
type Proof = [u8; 32];

/// What a rank needs to greet: its place and its group's key.
pub(super) struct Greeter {
    group_key: Vec<u8>,
    place: Place,
}

impl Greeter {
    pub(super) fn new(group_key: &[u8], place: Place) -> Self {
        Self { group_key: group_key.to_vec(), place }
    }

    /// Greets `acceptor` over a fresh connection.
    pub(super) fn dial(&self, mut stream: &TcpStream, acceptor: usize, patience: Duration) -> io::Result<()> {
        set_time_outs(stream, patience)?;
        let nonce = random_nonce();
        let mut hello = Vec::with_capacity(HELLO_BYTES);
        hello.extend_from_slice(&MAGIC);
        hello.extend_from_slice(&self.group_id());
        hello.extend_from_slice(&(self.place.rank as u32).to_le_bytes());
        hello.extend_from_slice(&nonce);
        stream.write_all(&hello)?;
        let theirs: Nonce = read_array(stream)?;
        let proof: Proof = read_array(stream)?;
        if !same(&proof, &self.proof("accept", self.place.rank, acceptor, &nonce, &theirs)) {
            return Err(refused("it does not hold the group's key"));
        }
        stream.write_all(&self.proof("dial", self.place.rank, acceptor, &nonce, &theirs))
    }

    /// Answers a greeting; says which rank it was.
    pub(super) fn accept(&self, mut stream: &TcpStream, patience: Duration) -> io::Result<usize> {
        set_time_outs(stream, patience)?;
        let magic: [u8; 8] = read_array(stream)?;
        let group: [u8; 16] = read_array(stream)?;
        let dialler = u32::from_le_bytes(read_array(stream)?) as usize;
        let theirs: Nonce = read_array(stream)?;
        if magic != MAGIC || group != self.group_id() || dialler >= self.place.world_size {
            return Err(refused("it is not of this group"));
        }
        let nonce = random_nonce();
        stream.write_all(&nonce)?;
        stream.write_all(&self.proof("accept", dialler, self.place.rank, &theirs, &nonce))?;
        let proof: Proof = read_array(stream)?;
        if !same(&proof, &self.proof("dial", dialler, self.place.rank, &theirs, &nonce)) {
            return Err(refused("it does not hold the group's key"));
        }
        Ok(dialler)
    }

    fn group_id(&self) -> [u8; 16] {
        let digest = Sha256::new_with_prefix(b"phalanx group").chain_update(&self.group_key).finalize();
        std::array::from_fn(|i| digest[i])
    }

    fn proof(&self, side: &str, dialler: usize, acceptor: usize, dials: &Nonce, accepts: &Nonce) -> Proof {
        let mut message = side.as_bytes().to_vec();
        message.extend_from_slice(&(dialler as u32).to_le_bytes());
        message.extend_from_slice(&(acceptor as u32).to_le_bytes());
        message.extend_from_slice(&(self.place.world_size as u32).to_le_bytes());
        message.extend_from_slice(dials);
        message.extend_from_slice(accepts);
        hmac_sha256(&self.group_key, &message)
    }
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new_with_prefix(block.map(|byte| byte ^ 0x36)).chain_update(message).finalize();
    Sha256::new_with_prefix(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().into()
}

/// Compares in the same time wherever the difference is.
fn same(a: &Proof, b: &Proof) -> bool {
    a.iter().zip(b).fold(0, |difference, (x, y)| difference | (x ^ y)) == 0
}

fn random_nonce() -> Nonce {
    let mut nonce = [0; 32];
    nonce[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    nonce[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    nonce
}

fn set_time_outs(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    let patience = Some(patience.max(Duration::from_millis(1)));
    stream.set_read_timeout(patience)?;
    stream.set_write_timeout(patience)
}

fn read_array<const N: usize>(mut stream: &TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn refused(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn greet(dialler_key: &[u8], acceptor_key: &[u8]) -> (io::Result<()>, io::Result<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let dialler = Greeter::new(dialler_key, Place { rank: 1, world_size: 2 });
        let acceptor = Greeter::new(acceptor_key, Place { rank: 0, world_size: 2 });
        std::thread::scope(|scope| {
            let side = scope.spawn(move || acceptor.accept(&accepted, PATIENCE));
            let dialled = dialler.dial(&stream, 0, PATIENCE);
            drop(stream);
            (dialled, side.join().unwrap())
        })
    }

    #[test]
    fn ranks_with_the_key_meet_and_strangers_do_not() {
        let (dialled, accepted) = greet(&[7; 32], &[7; 32]);
        dialled.unwrap();
        assert_eq!(accepted.unwrap(), 1);
        let (dialled, accepted) = greet(&[8; 32], &[7; 32]);
        assert!(dialled.is_err() && accepted.is_err());
    }

    /// RFC 4231, test case 2.
    #[test]
    fn the_mac_is_the_standard_one() {
        let mac = hmac_sha256(b"Jefe", b"what do ya want for nothing?");
        assert_eq!(mac[..4], [0x5b, 0xdc, 0xc1, 0x46]);
        assert_eq!(mac[28..], [0x64, 0xec, 0x38, 0x43]);
    }
}
