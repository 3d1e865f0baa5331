//! Messages between head, agents and ranks: a byte that names the kind, then protobuf. What is accepted is the same after
//! another turn over the wire.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use phalanx_proto::pb::head_to_rank::Message as M;
use phalanx_proto::{
    AgentCommand, AgentEvent, EditStaging, LoadModel, MaskStaging, RankEvent, StepPlan, WireError, edit_messages,
    mask_messages, pb,
};
use prost::Message;

/// Decodes, converts, and where both succeed converts back and forth again.
fn turn<W, D>(data: &[u8], to_wire: impl Fn(&D) -> W)
where
    W: Message + Default,
    D: TryFrom<W, Error: Debug> + Debug,
{
    let Ok(wire) = W::decode(data) else { return };
    let Ok(domain) = D::try_from(wire) else { return };
    let again = to_wire(&domain);
    let again = W::decode(again.encode_to_vec().as_slice()).expect("what was encoded");
    let again = D::try_from(again).expect("what was valid");
    // Text, since a NaN is not equal to itself.
    assert_eq!(format!("{again:?}"), format!("{domain:?}"));
}

/// A rank's side: messages, each behind its length, as they would come one after the other.
fn session(data: &[u8]) -> Result<(), WireError> {
    let (mut masks, mut edits) = (MaskStaging::default(), EditStaging::default());
    let mut rest = data;
    while let Ok(message) = pb::HeadToRank::decode_length_delimited(&mut rest) {
        match message.message {
            Some(M::Plan(plan)) => {
                let mut plan: StepPlan = plan.try_into()?;
                masks.complete(&mut plan)?;
                edits.complete(&mut plan)?;
                again(&plan);
            }
            Some(M::SampleInputs(inputs)) => masks.keep(inputs)?,
            Some(M::StageEdits(part)) => edits.keep(part)?,
            Some(M::Load(load)) => drop(LoadModel::try_from(load)?),
            _ => {}
        }
        if rest.is_empty() {
            break;
        }
    }
    Ok(())
}

/// A plan that was accepted is the same after another turn.
fn again(plan: &StepPlan) {
    let (mut masks, mut edits) = (MaskStaging::default(), EditStaging::default());
    for message in mask_messages(plan).into_iter().chain(edit_messages(plan)) {
        match message.message {
            Some(M::SampleInputs(inputs)) => masks.keep(inputs).expect("valid masks"),
            Some(M::StageEdits(part)) => edits.keep(part).expect("valid edits"),
            _ => {}
        }
    }
    let mut other: StepPlan = pb::Plan::from(plan).try_into().expect("a valid plan");
    masks.complete(&mut other).expect("the masks of the plan");
    edits.complete(&mut other).expect("the edits of the plan");
    assert_eq!(other.chain(7), plan.chain(7));
    assert_eq!(format!("{other:?}"), format!("{plan:?}"));
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => drop(session(data)),
        1 => turn(data, |event: &RankEvent| pb::RankMessage::from(event.clone())),
        2 => turn(data, |event: &AgentEvent| pb::AgentMessage::from(event.clone())),
        3 => turn(data, |command: &AgentCommand| pb::HeadToAgent::from(command.clone())),
        _ => turn(data, |load: &LoadModel| pb::LoadModel::from(load)),
    }
});
