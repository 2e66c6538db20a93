package main

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"time"
)

// A section is what one waiter went through: its wait, and what it did with the lock. Times are ns of
// CLOCK_MONOTONIC.
type section struct {
	waiter   int64 // unique among all processes, once they are put together
	wanted   int64 // when it began to wait
	held     int64 // when it had the lock; 0 if the end came first
	released int64 // just before it called release
}

// writeSections writes a file of little-endian quadruples.
func writeSections(path string, sections []section) (err error) {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	w := bufio.NewWriter(file)
	var quadruple []byte
	for _, s := range sections {
		quadruple = quadruple[:0]
		for _, number := range []int64{s.waiter, s.wanted, s.held, s.released} {
			quadruple = binary.LittleEndian.AppendUint64(quadruple, uint64(number))
		}
		if _, err := w.Write(quadruple); err != nil {
			return err
		}
	}
	return w.Flush()
}

func readSections(path string) ([]section, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // It was only read.
	r := bufio.NewReader(file)
	var sections []section
	for {
		var numbers [4]int64
		switch err := binary.Read(r, binary.LittleEndian, &numbers); {
		case errors.Is(err, io.EOF):
			return sections, nil
		case err != nil:
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		sections = append(sections, section{numbers[0], numbers[1], numbers[2], numbers[3]})
	}
}

// checkAlone returns an error if two held one lock at the same time. The sections are all of one id.
func checkAlone(sections []section) error {
	held := slices.DeleteFunc(slices.Clone(sections), func(s section) bool { return s.held == 0 })
	slices.SortFunc(held, func(a, b section) int { return cmp.Compare(a.held, b.held) })
	for i, s := range held {
		if s.released < s.held {
			return fmt.Errorf("waiter %d released %v before it held", s.waiter, time.Duration(s.held-s.released))
		}
		if i > 0 && s.held < held[i-1].released {
			return fmt.Errorf("mutual exclusion was violated: waiters %d and %d both held the lock for %v",
				held[i-1].waiter, s.waiter, time.Duration(min(held[i-1].released, s.released)-s.held))
		}
	}
	return nil
}

// withTurns adds what the sections of a contended run say. The run lasted from start to stop; what
// happened afterwards only shows that mutual exclusion held to the end.
func (r Run) withTurns(sections []section, waiters int, start, stop int64) Run {
	counts := make(map[int64]int)
	var waited, longest, waits int64
	for _, s := range sections {
		if s.wanted >= stop {
			continue
		}
		until := s.held
		if until == 0 || until > stop {
			until = stop
		}
		waits++
		waited += until - s.wanted
		longest = max(longest, until-s.wanted)
		if s.held != 0 && s.held <= stop {
			counts[s.waiter]++
		}
		if s.held != 0 && s.released <= stop {
			r.Sections++
		}
	}
	r.Seconds = time.Duration(stop - start).Seconds()
	r.LongestWait = float64(longest) / 1e6
	r.MeanWait = ratio(float64(waited), float64(waits)) / 1e6
	r.Starved = waiters - len(counts)
	if r.Starved == 0 {
		r.FewestTurns = math.MaxInt
	}
	for _, n := range counts {
		r.FewestTurns = min(r.FewestTurns, n)
		r.MostTurns = max(r.MostTurns, n)
	}
	return r
}

// handovers returns how long the lock took from one waiter to the other, in µs, in rising order:
// from the first release after the other had begun to wait, to when it held. A waiter who was overtaken has
// thus waited for the section of the one who overtook it, too.
func handovers(sections []section, stop int64) []float64 {
	byHeld := slices.DeleteFunc(slices.Clone(sections), func(s section) bool { return s.held == 0 || s.held > stop })
	slices.SortFunc(byHeld, func(a, b section) int { return cmp.Compare(a.held, b.held) })
	var took []float64
	for i, s := range byHeld {
		first := int64(0)
		for j := i - 1; j >= 0 && byHeld[j].released > s.wanted; j-- {
			first = byHeld[j].released
		}
		if first != 0 {
			took = append(took, float64(s.held-first)/1e3)
		}
	}
	slices.Sort(took)
	return took
}
