//! What became of the cells of the fault matrix, for machines.

use serde_json::{Map, Value, json};

use super::faults::{Played, Report, Verdict, words};

/// All cells that were played, with what was measured in each.
pub fn to_json(report: &Report) -> Value {
    json!({
        "right": report.count(Verdict::Right), "left_out": report.count(Verdict::LeftOut),
        "wrong": report.count(Verdict::Wrong), "cells": report.cells.iter().map(cell).collect::<Vec<_>>(),
    })
}

fn cell(played: &Played) -> Value {
    let figures = played.figures.iter();
    let figures: Map<String, Value> = figures
        .map(|(name, time)| (format!("{}_ms", name.replace(' ', "_")), json!(time.as_millis() as u64)))
        .collect();
    json!({
        "fault": words(played.cell.fault), "victim": words(played.cell.victim), "moment": words(played.cell.moment),
        "expected": words(played.cell.expected), "verdict": words(played.verdict),
        "seconds": played.took.as_secs_f64(), "figures": figures,
    })
}
