package main

import (
	"fmt"
	"strings"
)

// A bound is what a number must not be above, or below.
type bound struct {
	sense sense // more: at least the limit; less: at most
	limit float64
}

func atLeast(limit float64) bound { return bound{more, limit} }
func atMost(limit float64) bound  { return bound{less, limit} }

func (b bound) verdict(value float64) string {
	if b.sense == more && value >= b.limit || b.sense == less && value <= b.limit {
		return "met"
	}
	return "**not met**"
}

func (b bound) String() string {
	if b.sense == more {
		return "≥ " + short(b.limit)
	}
	return "≤ " + short(b.limit)
}

// targetsTable says what this library is meant to reach, and whether it did.
func targetsTable(r Results) string {
	t := targets{results: r}
	t.uncontended()
	t.handover()
	t.contended()
	t.idle()
	return table([]string{"", "", "measured", "target", ""}, 2, t.rows)
}

// targets are the rows of the table, as far as it is written.
type targets struct {
	results Results
	rows    [][]string
}

func (t *targets) uncontended() {
	for _, goal := range []struct {
		goroutines int
		library    string
		least      float64
	}{
		{1, "floor", 0.90},
		{16, "rueidislock", 1.15},
		{256, "rueidislock", 1.3},
		{1024, "rueidislock", 1.3},
		{16, "redislock", 1.5},
		{256, "redislock", 2.5},
		{1024, "redislock", 3},
	} {
		t.ratio("uncontended", cycles(0, goal.goroutines)[0], metricsOf(Cycles)[0], goal.library, atLeast(goal.least))
	}
}

func (t *targets) handover() {
	p50 := metricsOf(Handover)[0]
	t.ratio("release to held", handover(0, 2), p50, "rueidislock", atMost(0.65))
	t.ratio("release to held", handover(0, 2), p50, "npm redfour", atMost(0.35))
}

func (t *targets) contended() {
	perSecond, commands := metricsOf(Contend)[0], metricsOf(Contend)[1]
	starved := metric{"starved waiters, in the worst repetition", func(r Run) float64 { return float64(r.Starved) }, less}
	for _, waiters := range []int{16, 128, 1000} {
		load := contend(0, waiters, 4, 0)
		t.best("one id", load, perSecond, "the best peer", anyPeer, atLeast(1.3))
		t.figure("one id", load, commands, Figure.median, atMost(1.1))
		t.figure("one id", load, starved, Figure.max, atMost(0))
	}
	t.best("one id", contend(0, 2, 2, 0), perSecond, "the best peer that serves both (one at most ten times as often as the other)",
		servesAll, atLeast(1))
}

// servesAll says that no waiter of a cell had more than ten times as many turns as another.
func servesAll(c Cell) bool {
	fewest := c.Figure(func(r Run) float64 { return ratio(float64(r.FewestTurns), float64(r.MostTurns)) })
	return fewest.Min >= 0.1
}

func (t *targets) idle() {
	for _, goal := range []struct {
		ids int
		kB  float64
	}{{1, 4}, {10_000, 6}} {
		load := idle(10_000, goal.ids)
		// What is due once in a while may come once more in a run than its length allows for.
		cell, _ := t.results.Cell(load, ours)
		seconds := cell.Figure(func(r Run) float64 { return r.Seconds }).Min
		due := 2 + float64(goal.ids)/30 + ratio(1, seconds)
		commands := metric{"commands/s; due are a ping and a check a second, and a look every 30 s for each id", Run.CommandsPerSecond, less}
		t.figure("idle", load, commands, Figure.max, atMost(due))
		t.figure("idle", load, metricsOf(Idle)[1], Figure.median, atMost(goal.kB))
	}
}

func (f Figure) median() float64 { return f.Median }
func (f Figure) max() float64    { return f.Max }

// figure adds a row for a number that is not compared.
func (t *targets) figure(workload string, load Load, m metric, of func(Figure) float64, b bound) {
	own, ok := t.results.Cell(load, ours)
	if missing := missing(own, ok); missing != "" {
		t.row(workload, load, m.name, missing, b, "–")
		return
	}
	value := of(own.Figure(m.of))
	t.row(workload, load, m.name, short(value), b, b.verdict(value))
}

// ratio adds a row for the ratio to one library.
func (t *targets) ratio(workload string, load Load, m metric, library string, b bound) {
	what := fmt.Sprintf("%s ÷ %s", m.unitless(), library)
	own, ownOK := t.results.Cell(load, ours)
	other, otherOK := t.results.Cell(load, library)
	for _, missing := range []string{missing(own, ownOK), missing(other, otherOK)} {
		if missing != "" {
			t.row(workload, load, what, missing, b, "–")
			return
		}
	}
	value := ratio(own.Figure(m.of).Median, other.Figure(m.of).Median)
	t.row(workload, load, what, short(value), b, b.verdict(value))
}

// best adds a row for the ratio to the best peer that qualifies.
func (t *targets) best(workload string, load Load, m metric, who string, qualifies func(Cell) bool, b bound) {
	own, ok := t.results.Cell(load, ours)
	what := fmt.Sprintf("%s ÷ %s", m.unitless(), who)
	peer, median, found := t.results.bestPeer(load, m, qualifies)
	switch missing := missing(own, ok); {
	case missing != "":
		t.row(workload, load, what, missing, b, "–")
	case !found:
		t.row(workload, load, what, "no such peer", b, "–")
	default:
		value := ratio(own.Figure(m.of).Median, median)
		t.row(workload, load, fmt.Sprintf("%s: %s", what, peer), short(value), b, b.verdict(value))
	}
}

// unitless is the name of a ratio's part.
func (m metric) unitless() string {
	name, _, _ := strings.Cut(m.name, ", ")
	return name
}

// missing says why a cell has no figure, or nothing if it has.
func missing(c Cell, found bool) string {
	switch {
	case !found:
		return "not measured"
	case !c.counts():
		return c.Library + " has no figures"
	}
	return ""
}

func (t *targets) row(workload string, load Load, what, measured string, b bound, verdict string) {
	t.rows = append(t.rows, []string{workload + ", " + load.title(), what, measured, b.String(), verdict})
}
