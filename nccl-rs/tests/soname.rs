//! The loader finds a library by its bare name. Alone in its file: what one test has opened, another would find.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

#[expect(dead_code, reason = "the other tests turn its knobs")]
mod standin;

use nccl_rs::{Library, Search, Vendor};
use standin::StandIn;

#[test]
fn a_library_is_found_by_its_bare_name_and_nccl_goes_first() {
    let rccl = StandIn::build("librccl.so.1", &["-DVERSION=22203", "-Wl,-soname,librccl.so.1"]);
    rccl.open_raw();
    let only_rccl = Search { vendor: Some(Vendor::Rccl), ..Search::default() };
    let library = Library::open(&only_rccl).expect("RCCL by its name");
    assert_eq!((library.vendor(), library.version().to_string().as_str()), (Vendor::Rccl, "2.22.3"));
    assert_eq!(library.path(), rccl.file());

    let nccl = StandIn::build("libnccl.so.2", &["-Wl,-soname,libnccl.so.2"]);
    nccl.open_raw();
    let library = Library::open(&Search::default()).expect("NCCL by its name");
    assert_eq!((library.vendor(), library.version().to_string().as_str()), (Vendor::Nccl, "2.28.9"));
    assert_eq!(library.path(), nccl.file());
}
