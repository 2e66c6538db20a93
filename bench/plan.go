package main

import (
	"fmt"
	"time"
)

// networkMS is the round trip of the emulated network.
const networkMS = 1

// A part of the plan is a load, and how often and for how long every library is under it.
type part struct {
	load   Load
	reps   int
	length time.Duration
}

// name is what -only matches.
func (l Load) name() string {
	switch {
	case l.NetworkMS > 0:
		return "network " + string(l.Workload)
	case l.Masters > 0:
		return "cluster " + string(l.Workload)
	}
	return string(l.Workload)
}

// String says what a load is.
func (l Load) String() string {
	text := fmt.Sprintf("%s, %d waiters in %d processes", l.name(), l.Waiters, l.Processes)
	switch {
	case l.Workload == Cycles:
		text = fmt.Sprintf("%s, %d goroutines", l.name(), l.Waiters)
	case l.Workload == Idle:
		text += fmt.Sprintf(", on %d ids", l.IDs)
	case l.SectionUS > 0:
		text += fmt.Sprintf(", sections of %v", time.Duration(l.SectionUS)*time.Microsecond)
	}
	if l.Masters > 0 {
		text += ", " + plural(l.Masters, "master")
	}
	return text
}

// plan returns what there is to run.
func (o options) plan() []part {
	var parts []part
	add := func(reps int, length time.Duration, loads ...Load) {
		for _, l := range loads {
			if o.only.MatchString(l.name()) {
				parts = append(parts, part{load: l, reps: reps, length: length})
			}
		}
	}
	if o.quick {
		for _, network := range []int{0, networkMS} {
			add(2, 500*time.Millisecond, cycles(network, 1)...)
			add(1, 500*time.Millisecond, cycles(network, 16, 256)...)
		}
		add(1, time.Second, handover(0, 2), handover(0, 1), handover(networkMS, 2))
		add(1, time.Second, contend(0, 2, 2, 0), contend(0, 128, 4, 0), contend(0, 16, 4, 1000), contend(networkMS, 16, 4, 0))
		add(1, 750*time.Millisecond, idle(10_000, 1), idle(10_000, 10_000))
		add(1, 500*time.Millisecond, append(inCluster(1, cycles(0, 1024)...), inCluster(3, cycles(0, 1024)...)...)...)
		add(1, time.Second, inCluster(3, handover(0, 2))...)
		return parts
	}
	const length = time.Second
	add(3*o.reps, length, cycles(0, 1)...)
	add(o.reps, length, cycles(0, 16, 256, 1024)...)
	add(o.reps, 2*length, handover(0, 2), handover(0, 1))
	for _, sectionUS := range []int{0, 1000} {
		add(o.reps, length, contend(0, 2, 1, sectionUS), contend(0, 2, 2, sectionUS))
		for _, processes := range []int{1, 4} {
			for _, waiters := range []int{16, 128, 1000} {
				add(o.reps, length, contend(0, waiters, processes, sectionUS))
			}
		}
	}
	add(o.reps, 2*length, idle(10_000, 1), idle(10_000, 10_000))
	add(o.reps, length, cycles(networkMS, 1, 16, 256, 1024)...)
	add(o.reps, 2*length, handover(networkMS, 2))
	add(o.reps, length, contend(networkMS, 16, 4, 0))
	// Those of one cluster follow each other, so that it has to form only once.
	add(o.reps, length, inCluster(1, cycles(0, 16, 1024)...)...)
	add(o.reps, length, inCluster(3, cycles(0, 16, 1024)...)...)
	add(o.reps, 2*length, inCluster(3, handover(0, 2))...)
	return parts
}

func cycles(network int, goroutines ...int) []Load {
	var loads []Load
	for _, n := range goroutines {
		loads = append(loads, Load{Workload: Cycles, Processes: 1, Waiters: n, IDs: n, NetworkMS: network})
	}
	return loads
}

func handover(network, processes int) Load {
	return Load{Workload: Handover, Processes: processes, Waiters: 2, IDs: 1, NetworkMS: network}
}

func contend(network, waiters, processes, sectionUS int) Load {
	return Load{
		Workload: Contend, Processes: processes, Waiters: waiters, IDs: 1, SectionUS: sectionUS, NetworkMS: network,
	}
}

func idle(waiters, ids int) Load {
	return Load{Workload: Idle, Processes: 1, Waiters: waiters, IDs: ids}
}

// inCluster returns the same loads in a cluster.
func inCluster(masters int, loads ...Load) []Load {
	for i := range loads {
		loads[i].Masters = masters
	}
	return loads
}
