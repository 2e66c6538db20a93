package main

import (
	"encoding/xml"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot/vg"
)

// A label is some text in a chart, and where it is. The axes of an SVG go right and down.
type label struct {
	text                     string
	size                     float64
	left, right, top, bottom float64
	bold                     bool
}

// labels returns all text in a chart.
func labels(t *testing.T, svg string) []label {
	t.Helper()
	var labels []label
	fontSize := regexp.MustCompile(`font-size:([0-9.]+)px`)
	d := xml.NewDecoder(strings.NewReader(svg))
	for {
		token, err := d.Token()
		if token == nil {
			require.ErrorContains(t, err, "EOF")
			return labels
		}
		start, ok := token.(xml.StartElement)
		if !ok || start.Name.Local != "text" {
			continue
		}
		attributes := make(map[string]string)
		for _, a := range start.Attr {
			attributes[a.Name.Local] = a.Value
		}
		var l label
		require.NoError(t, d.DecodeElement(&l.text, &start))
		var x, baseline float64
		_, err = fmt.Sscan(attributes["x"]+" "+attributes["y"]+" "+fontSize.FindStringSubmatch(attributes["style"])[1], &x, &baseline, &l.size)
		require.NoError(t, err)
		s := lettering(vg.Length(l.size), ink)
		if l.bold = strings.Contains(attributes["style"], "font-weight:bold"); l.bold {
			s.Font.Weight = xfont.WeightBold
		}
		l.left, l.right = x, x+s.Width(l.text).Points()
		l.top, l.bottom = baseline-0.75*l.size, baseline+0.25*l.size
		labels = append(labels, l)
	}
}

func TestCharts_allTextCanBeRead(t *testing.T) {
	charts := written(t, madeUp())
	delete(charts, "results.md")
	require.Len(t, charts, 5)
	for name, svg := range charts {
		all := labels(t, svg)
		require.NotEmpty(t, all)
		for i, a := range all {
			require.True(t, a.left >= 0 && a.right <= chartWidth, "%s: %q leaves the chart", name, a.text)
			require.GreaterOrEqual(t, a.size, 8.0, "%s: %q is small", name, a.text)
			for _, b := range all[:i] {
				apart := a.left >= b.right || b.left >= a.right || a.top >= b.bottom || b.top >= a.bottom
				require.True(t, apart, "%s: %q and %q overlap", name, a.text, b.text)
			}
		}
	}
}

func TestCharts_readersHaveAFont(t *testing.T) {
	for name, svg := range written(t, madeUp()) {
		require.NotContains(t, svg, "Liberation Sans;", name)
		require.NotContains(t, svg, "Liberation Serif", name)
	}
}

// A quick run measures less, and leaves no room for the rest.
func TestCharts_showOnlyWhatWasMeasured(t *testing.T) {
	r := madeUp()
	r.Cells = slices.DeleteFunc(r.Cells, func(c Cell) bool { return c.Waiters > 256 || c.Workload == Handover && c.NetworkMS > 0 })
	for _, chart := range []string{"cycles.svg", "contended.svg", "network.svg"} {
		for _, l := range labels(t, written(t, r)[chart]) {
			require.NotContains(t, []string{"1024 goroutines", "1000 waiters", "ms"}, l.text, chart)
		}
	}
}

// A library has the same colour whoever else is in the chart, and nobody has that of another but the floors.
func TestCharts_colours(t *testing.T) {
	all := colours(madeUp().Libraries)
	distinct := make(map[string]bool)
	for _, l := range madeUp().Libraries {
		if !l.Floor {
			distinct[fmt.Sprint(all[l.Name])] = true
		}
	}
	require.Len(t, distinct, 6)
	for _, c := range chartsOf(madeUp()) {
		require.Equal(t, all, c.colour, c.file)
	}
}

func TestCharts_emphasis(t *testing.T) {
	for name, svg := range written(t, madeUp()) {
		if name == "results.md" {
			continue
		}
		bold := make(map[string]bool)
		for _, l := range labels(t, svg) {
			if l.bold {
				bold[l.text] = true
			}
		}
		require.Contains(t, bold, ours, name)
		require.NotContains(t, slices.Collect(maps.Keys(bold)), "rueidislock", name)
	}
}

func TestTicks(t *testing.T) {
	for most, want := range map[float64]string{
		1: "0 0.5 1", 1.9: "0 0.5 1 1.5", 2: "0 1 2", 5: "0 1 2 3 4 5", 9: "0 2 4 6 8", 14_800: "0 5k 10k", 206_000: "0 100k 200k",
	} {
		var got []string
		for _, tick := range ticks(most) {
			got = append(got, tick.Label)
		}
		require.Equal(t, want, strings.Join(got, " "), "%v", most)
	}
	var got []string
	for _, tick := range logTicks(0.15, 12, 1, 2, 5) {
		got = append(got, tick.Label)
	}
	require.Equal(t, "0.2 0.5 1 2 5 10", strings.Join(got, " "))
}
