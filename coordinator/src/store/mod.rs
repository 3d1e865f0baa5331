//! What survives a restart of the head. So far: the head's term.
//!
//! **Invariant:** a term is on disk before the head that has it listens, so no two lives of a head share one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use phalanx_proto::Term;

/// Takes the next term: reads the last one, writes its successor, and returns that.
///
/// # Errors
/// The folder cannot be written, or the record is not a number.
pub fn next_term(dir: &Path) -> io::Result<Term> {
    fs::create_dir_all(dir)?;
    let path = dir.join("term");
    let last = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged: {error}", path.display()))
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let next = last + 1;
    let fresh = dir.join("term.new");
    let mut file = File::create(&fresh)?;
    writeln!(file, "{next}")?;
    file.sync_all()?;
    fs::rename(&fresh, &path)?;
    File::open(dir)?.sync_all()?;
    Ok(Term(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_grow_and_damage_is_said() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = dir.path().join("store");
        assert_eq!(next_term(&store).expect("writes"), Term(1));
        assert_eq!(next_term(&store).expect("writes"), Term(2));
        fs::write(store.join("term"), "two").expect("writes");
        assert!(next_term(&store).expect_err("damaged").to_string().contains("damaged"));
    }
}
